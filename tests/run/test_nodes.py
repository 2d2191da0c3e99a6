"""Several nodes: two torchruns on this machine, and what must be the same on both."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distill.config.generate import CaptureConfig, GenerateConfig
from distill.errors import UserError
from distill.run import nodes
from distill.run.board import Board
from distill.run.grid import Grid
from distill.run.nodes import check_nodes
from tests.processes import children, committed
from tests.support import blocks_logged, environment, generate, has, tree, wait_for


def both(configs: list[GenerateConfig], folder: str) -> None:
    """check_nodes on two nodes of one worker; raises what worker 0 raises."""
    board = Board(torch.distributed.HashStore())
    grids = [Grid(rank=i, world_size=2, node=i, num_nodes=2, launched=True) for i in range(2)]
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
    with pytest.raises(UserError, match=rf"node {socket.gethostname()}: capture.k: worker 0 has 24, this node 9$"):
        both([GenerateConfig(), other], str(tmp_path / "x.zarr"))


def test_a_folder_that_is_not_shared_names_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_appears", lambda probe: False)
    with pytest.raises(UserError, match="does not see; expected one folder that all nodes share"):
        both([GenerateConfig(), GenerateConfig()], str(tmp_path / "x.zarr"))
    assert not list(tmp_path.iterdir())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def node(folder: Path, port: int, arguments: list[str], *options: str, **variables: str) -> subprocess.Popen[str]:
    """One node's torchrun, in `folder`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    with (folder / f"console_{len(list(folder.glob('console_*')))}").open("w") as console:
        return subprocess.Popen(
            [*torchrun, "--rdzv_endpoint", f"127.0.0.1:{port}", *options, "-m", "distill.generate", *arguments],
            cwd=folder, env={**environment(), **variables}, stderr=console, text=True,
        )  # fmt: skip


def kill(torchrun: subprocess.Popen[str]) -> None:
    """As when the node dies."""
    for process in [*children(torchrun.pid), torchrun.pid]:
        os.kill(process, signal.SIGKILL)
    torchrun.wait()


def consoles(*folders: Path) -> list[str]:
    return [file.read_text() for folder in folders for file in sorted(folder.glob("console_*"))]


def test_two_nodes_make_the_store_of_one(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Two torchruns of two workers; each node has one replica in two stages. There is one bar, on one console.

    A worker dies, and torchrun starts all of them again: only its own node counts that as a restart.
    """
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(300)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=256"]
    ways = [*arguments, "parallel.mode=pipeline", "parallel.shard_size=2"]
    port, nodes = free_port(), ["--nnodes", "2", "--nproc_per_node", "2", "--max-restarts", "1"]
    running = [node(tmp_path, port, ways, *nodes) for _ in range(2)]
    wait_for(lambda: committed(tmp_path / "x.zarr") > 3, lambda: consoles(tmp_path))
    os.kill(max(children(running[1].pid)), signal.SIGKILL)
    assert [process.wait(timeout=240) for process in running] == [0, 0], consoles(tmp_path)
    assert sorted("tokens/s" in console for console in consoles(tmp_path)) == [False, True]
    assert sorted("perplexity" in console for console in consoles(tmp_path)) == [False, True]
    logs = [(tmp_path / "logs" / f"worker_{rank}.{socket.gethostname()}.log").read_text() for rank in range(4)]
    for rank, log in enumerate(logs):
        assert log.count(f"this worker is replica {rank // 2} of 2, shard rank {rank % 2} of 2") == 2
    blocks = blocks_logged(tmp_path)
    assert len(blocks) == len({*blocks})
    (tmp_path / "alone").mkdir()
    alone = generate(tmp_path / "alone", *arguments)
    assert alone.returncode == 0, alone.stderr
    assert tree(tmp_path / "x.zarr") == tree(tmp_path / "alone" / "x.zarr")


def test_nodes_that_differ_end_with_one_message(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Another folder, another setting, and another version of the package on the second node."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(40)}", "store.path=x.zarr"]
    folders = [tmp_path / "one", tmp_path / "other"]
    shim = tmp_path / "shim" / "distill-99.dist-info"
    for folder in (*folders, shim):
        folder.mkdir(parents=True)
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: distill\nVersion: 99\n")
    port, nodes, ours = free_port(), ["--nnodes", "2", "--nproc_per_node", "1"], environment()["PYTHONPATH"]
    running = [
        node(folders[0], port, [*arguments, "capture.k=8"], *nodes),
        node(folders[1], port, [*arguments, "capture.k=9"], *nodes, PYTHONPATH=f"{shim.parent}{os.pathsep}{ours}"),
    ]
    assert all(process.wait(timeout=240) != 0 for process in running)
    found = "".join(consoles(*folders))
    assert found.count("error: the nodes differ:") == 1, found
    told = re.findall(rf"node {socket.gethostname()}: (\S+): worker 0 (has|wrote)", found)
    assert told == [("distill", "has"), ("capture.k", "has"), ("x.zarr", "wrote")], found
    assert not list(tmp_path.glob("*/x.zarr"))
    assert not list(tmp_path.glob("*/.distill-*"))


def test_a_node_joins_and_dies_and_the_rest_goes_on(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Elastic: what is missing is dealt again to the workers that there are, without a restart by hand."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(300)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=256"]
    elastic = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3"]
    elastic += ["--rdzv_conf", "last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=4"]

    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else a node that joins waits in vain (torch 2.13)
    port = free_port()
    first = node(tmp_path, port, [*arguments, "timeout_seconds=4"], *elastic, **own_store)
    running = [first]
    try:
        wait_for(lambda: committed(tmp_path / "x.zarr") > 3, lambda: consoles(tmp_path))
        [worker] = children(first.pid)
        os.kill(worker, signal.SIGSTOP)  # or it would be done before the second node is there
        second = node(tmp_path, port, [*arguments, "timeout_seconds=4"], *elastic, **own_store)
        running.append(second)
        pending = re.compile(r"ShdPnd:\s*(\w+)")
        stopped = Path(f"/proc/{worker}/status")
        wait_for(lambda: int(pending.findall(stopped.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1)
        os.kill(worker, signal.SIGCONT)
        theirs = tmp_path / "logs" / f"worker_1.{socket.gethostname()}.log"
        wait_for(lambda: has(theirs, "is committed"), lambda: consoles(tmp_path))
        kill(second)
        assert first.wait(timeout=240) == 0, consoles(tmp_path)
    finally:
        for torchrun in running:
            if torchrun.poll() is None:  # a failure of the test
                kill(torchrun)
    blocks = blocks_logged(tmp_path)
    assert len(blocks) == len({*blocks})
    (tmp_path / "alone").mkdir()
    alone = generate(tmp_path / "alone", *arguments)
    assert alone.returncode == 0, alone.stderr
    assert tree(tmp_path / "x.zarr") == tree(tmp_path / "alone" / "x.zarr")
