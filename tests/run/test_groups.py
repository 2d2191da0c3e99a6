"""A process group that breaks."""

import pytest
import torch

from distill.errors import PeerError
from distill.run import groups
from distill.run.grid import Grid


@pytest.mark.parametrize(
    ("error", "told"),
    [("Connection closed by peer", "is gone"), ("Timed out waiting 7000ms for recv", "does not answer")],
)
def test_only_the_others_errors_are_a_victims(error: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two workers that loses the other names it. An error of its own is raised as it is."""
    grid = Grid(world_size=2, local_world_size=2).sharded(2)
    monkeypatch.setattr(groups, "_GRACE_SECONDS", 0)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="mine"), groups.process_group(grid, torch.device("cpu"), 7):
        raise RuntimeError("mine")
    with (
        pytest.raises(PeerError, match=f"^worker 1 {told}$") as caught,
        groups.process_group(grid, torch.device("cpu"), 7),
    ):
        raise RuntimeError(f"[pair.cc:1] gloo: {error}")
    assert caught.value.ranks == [1]
