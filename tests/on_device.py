"""A tensor that stands for one of a GPU, where none is at hand."""

import torch


class OnDevice(torch.Tensor):
    """Whoever reads its values on the host would wait for all that a GPU has still to compute: that is an error here.
    What is computed from it is one as well."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__array__", "__int__", "__float__"}:
            raise AssertionError(f"the host waits for a GPU: {name}")
        return super().__torch_function__(function, types, args, kwargs or {})
