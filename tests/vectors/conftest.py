"""A whole store, for the tests of what reads and what writes it."""

import pytest
from small_store import PLAN, encode, records

from hlm.vectors.store import write_store


@pytest.fixture
def whole(tmp_path):
    write_store(tmp_path / "whole", records, encode, **PLAN)
    return tmp_path / "whole"
