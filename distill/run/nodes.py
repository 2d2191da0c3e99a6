"""Compare the nodes before any work: they must have the same versions and settings, and see the same folders.

The first worker of each node compares. A difference ends the run with one message from worker 0, which names the node.
"""

import importlib.metadata
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.run.board import Board
from distill.run.grid import Grid
from distill.settings import flat, secret_digests

_PACKAGES = ("distill", "torch", "transformers", "zarr", "numcodecs", "datasets")
PROBE = ".distill-"
"""The prefix of a file that worker 0 writes, so that the other nodes can check that they see the same folder."""

_PATIENCE_SECONDS = 30.0  # network file systems show new files late


def check_nodes(grid: Grid, board: Board, config: Any, folder: str) -> None:
    """Raise UserError where a node has other versions or settings than worker 0, or does not see its files.

    folder: where the run writes; need not exist yet. A URL is not checked: it means the same on every node.
    """
    if grid.local_rank > 0 or grid.num_nodes == 1:
        return
    facts = {name: importlib.metadata.version(name) for name in _PACKAGES} | flat(config)
    at = Path(folder).absolute()  # on this node
    if grid.rank > 0:
        theirs, salt, their_secrets = json.loads(board.wait("facts of worker 0"))
        probe, our_secrets = board.wait("probe of worker 0"), secret_digests(config, salt)
        found = [
            f"{name}: worker 0 has {theirs.get(name)}, this node {ours}"
            for name, ours in facts.items()
            if ours != theirs.get(name)
        ]
        for name in sorted({*their_secrets, *our_secrets}):
            if their_secrets.get(name) != our_secrets.get(name):
                found.append(f"{name}: worker 0 has another value than this node (both are hidden)")
        if probe and not _appears(_join(at, probe)):
            found.append(
                f"{folder}: worker 0 wrote a file in it or above it, which this node ({at}) does not see; "
                "expected one folder that all nodes share"
            )
        board.note(f"verdict of node {grid.node}", json.dumps([socket.gethostname(), found]))
    else:
        probe = "" if "://" in folder else _probe(at)
        if probe:
            _join(at, probe).touch()
        salt = secrets.token_hex(16)
        board.note("facts of worker 0", json.dumps([facts, salt, secret_digests(config, salt)]))
        board.note("probe of worker 0", probe)
        try:
            verdicts = [json.loads(board.wait(f"verdict of node {node}")) for node in range(1, grid.num_nodes)]
        finally:
            if probe:
                _join(at, probe).unlink(missing_ok=True)
        if lines := [f"node {host}: {line}" for host, found in verdicts for line in found]:
            raise UserError("\n  ".join(["the nodes differ:", *lines]))


def _probe(folder: Path) -> str:
    """The path, relative to `folder`, of a new file in its nearest parent folder that exists."""
    up = ""
    while not folder.is_dir():
        folder, up = folder.parent, f"../{up}"
    return f"{up}{PROBE}{secrets.token_hex(4)}"


def _join(folder: Path, probe: str) -> Path:
    return Path(os.path.normpath(folder / probe))  # the folder itself need not exist


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
