"""What must be the same on every node, looked at before any work: versions, settings, and the folders they share.

The first worker of each node looks; a difference ends the run with one message, from worker 0, that names the node.
"""

import importlib.metadata
import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.parallel import Board, Grid
from distill.settings import flat

_PACKAGES = ("distill", "torch", "transformers", "zarr", "numcodecs", "datasets")
_PATIENCE_SECONDS = 30.0  # network file systems show new files late


def check_nodes(grid: Grid, board: Board, config: Any, folder: str) -> None:
    """Raise UserError where a node has other versions or settings than worker 0, or does not see what that writes.

    folder: a path, or the URL of an object store, which every node is taken to see. It need not exist yet.
    """
    if grid.local_rank > 0 or grid.world_size == grid.local_world_size:
        return
    facts = {name: importlib.metadata.version(name) for name in _PACKAGES} | flat(config)
    if grid.rank > 0:
        theirs, probe = json.loads(board.wait("facts of worker 0")), board.wait("probe of worker 0")
        found = [
            f"{name}: worker 0 has {theirs.get(name)}, this node {ours}"
            for name, ours in facts.items()
            if ours != theirs.get(name)
        ]
        if probe and not _appears(Path(probe)):
            found.append(f"{folder}: worker 0 wrote {probe}, this node does not see it: expected a shared file system")
        board.note(f"verdict of node {grid.node}", json.dumps([socket.gethostname(), found]))
    else:
        probe = "" if "://" in folder else str(_nearest(folder) / f".distill-{secrets.token_hex(4)}")
        if probe:
            Path(probe).touch()
        board.note("facts of worker 0", json.dumps(facts))
        board.note("probe of worker 0", probe)
        try:
            nodes = range(1, grid.world_size // grid.local_world_size)
            verdicts = [json.loads(board.wait(f"verdict of node {node}")) for node in nodes]
        finally:
            if probe:
                Path(probe).unlink(missing_ok=True)
        if lines := [f"node {host}: {line}" for host, found in verdicts for line in found]:
            raise UserError("\n  ".join(["the nodes differ:", *lines]))


def _nearest(folder: str) -> Path:
    """The folder that exists on the way to `folder`."""
    at = Path(folder).expanduser().absolute()
    while not at.is_dir():
        at = at.parent
    return at


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
