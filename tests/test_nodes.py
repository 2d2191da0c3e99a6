"""Several nodes: two torchruns on this machine, and what must be the same on both."""

import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distill import nodes
from distill.config import CaptureConfig, GenerateConfig
from distill.errors import UserError
from distill.nodes import check_nodes
from distill.parallel import Board, Grid
from tests.support import environment, generate, tree


def both(configs: list[GenerateConfig], folder: str) -> None:
    """check_nodes on two nodes of one worker; raises what worker 0 raises."""
    board = Board(torch.distributed.HashStore())
    grids = [Grid(rank=i, world_size=2, node=i, launched=True) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(check_nodes, grid, board, config, folder) for grid, config in zip(grids, configs, strict=True)
        ]
        for future in reversed(running):  # only worker 0 speaks
            future.result(timeout=60)


def test_equal_nodes_pass_and_leave_nothing_behind(tmp_path: Path) -> None:
    both([GenerateConfig(), GenerateConfig()], str(tmp_path / "a" / "x.zarr"))
    both([GenerateConfig(), GenerateConfig()], "s3://bucket/x.zarr")
    assert not list(tmp_path.iterdir())


def test_other_settings_name_the_node(tmp_path: Path) -> None:
    other = GenerateConfig(capture=CaptureConfig(k=9))
    with pytest.raises(UserError, match=rf"node {socket.gethostname()}: capture.k: worker 0 has 64, this node 9$"):
        both([GenerateConfig(), other], str(tmp_path / "x.zarr"))


def test_a_folder_that_is_not_shared_names_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_appears", lambda probe: False)
    with pytest.raises(UserError, match="this node does not see it: expected a shared file system"):
        both([GenerateConfig(), GenerateConfig()], str(tmp_path / "x.zarr"))
    assert not list(tmp_path.iterdir())


def launch(folder: Path, arguments: list[list[str]]) -> list[tuple[int, str]]:
    """A torchrun with two workers for each list of arguments, as one run; their exit statuses and consoles."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    agents = ["--nnodes", str(len(arguments)), "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    running = [
        subprocess.Popen(
            [*torchrun, *agents, "--rdzv_endpoint", f"127.0.0.1:{port}", "-m", "distill.generate", *own],
            cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for own in arguments
    ]  # fmt: skip
    consoles = [process.communicate(timeout=240)[1] for process in running]
    return [(process.returncode, console) for process, console in zip(running, consoles, strict=True)]


def test_two_nodes_make_the_store_of_one(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Two torchruns of two workers; each node holds one copy in two stages. One bar, on one console."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(40)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=256"]
    ran = launch(tmp_path, [[*arguments, "parallel.mode=pipeline", "parallel.shard_size=2"]] * 2)
    assert [status for status, _ in ran] == [0, 0], ran
    assert sorted("tokens/s" in console for _, console in ran) == [False, True]
    assert sorted("perplexity" in console for _, console in ran) == [False, True]
    for rank in range(4):
        assert (
            f"replica {rank // 2} of 2, shard rank {rank % 2} of 2"
            in (tmp_path / "logs" / f"worker_{rank}.log").read_text()
            or rank == 0
        )
    (tmp_path / "alone").mkdir()
    alone = generate(tmp_path / "alone", *arguments)
    assert alone.returncode == 0, alone.stderr
    assert tree(tmp_path / "x.zarr") == tree(tmp_path / "alone" / "x.zarr")


def test_nodes_with_other_settings_end_with_one_message(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(40)}", "store.path=x.zarr"]
    ran = launch(tmp_path, [[*arguments, "capture.k=8"], [*arguments, "capture.k=9"]])
    assert all(status != 0 for status, _ in ran)
    consoles = "".join(console for _, console in ran)
    assert consoles.count("error: the nodes differ:") == 1, consoles
    assert "capture.k: worker 0 has" in consoles
    assert not (tmp_path / "x.zarr").exists()
