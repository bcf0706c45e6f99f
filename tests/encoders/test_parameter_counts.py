"""How many parameters an encoder has, as reports and cards say it."""

import torch

from hlm.encoders.pruning import parameter_counts


def test_parameter_counts_see_shared_weights_once():
    body = torch.nn.Linear(8, 4)
    words, positions = torch.nn.Embedding(10, 8), torch.nn.Embedding(5, 8)
    head = torch.nn.Linear(8, 10, bias=False)
    head.weight = words.weight
    assert parameter_counts(torch.nn.ModuleList([body, words, positions, head])) == (8 * 4 + 4 + 80 + 40, 36)
