"""What is said of a store at the end of a run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.teacher.summary import mean_kept_mass


@pytest.mark.parametrize("blocks", [1, 640, 641, 95_414])
def test_the_mean_mass_is_of_some_hundred_blocks(blocks: int) -> None:
    """Of all where there are no more; every fifth block is not committed, and every row of block b has b / blocks."""
    committed = np.arange(blocks) % 5 != 4
    read: list[int] = []

    def read_rows(name: str, start: int, stop: int) -> Any:
        assert (name, stop - start) == ("tail_logprob", 3)
        read.append(start // 3)
        with np.errstate(divide="ignore"):
            tail = np.log(np.full(3, 1 - read[-1] / blocks))
        return np.stack([tail, [0.0, 1.0, 2.0]], axis=1)

    store: Any = SimpleNamespace(
        attributes={"temperatures": [1.0, 2.0]}, block_rows=3, committed=lambda: committed, read_rows=read_rows
    )
    found = mean_kept_mass(store)
    there = np.flatnonzero(committed)
    distance = -(-len(there) // 512)
    assert read == there[::distance].tolist()
    assert len(read) <= 512
    assert found == pytest.approx(np.mean(there[::distance] / blocks))
    assert found == pytest.approx(np.mean(there / blocks), abs=0.01)
