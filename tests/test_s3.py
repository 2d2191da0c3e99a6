"""The real commands on a real S3 server: a local store's bytes, through kills and outages; one line for mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from distill import TeacherCache, inspect, verify
from distill.errors import StoreError
from tests.processes import children
from tests.store.seaweedfs import Server, options_file
from tests.support import command, environment, generate, has, tree, wait_for

IMPATIENT = """
import sys
from distill.generate import main
from distill.store import retry

if __name__ == "__main__":
    retry._PATIENCE_SECONDS = 3
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def expected(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, str]]:
    """The arguments of a run of some 50 blocks, without the store's path, and the files of its local store."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(120)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.block_rows=128"]
    folder = tmp_path_factory.mktemp("local")
    ran = generate(folder, *arguments, "store.path=x.zarr")
    assert ran.returncode == 0, ran.stderr
    return arguments, tree(folder / "x.zarr")


def begin(folder: Path, arguments: list[str], workers: int, script: str | None = None) -> subprocess.Popen[bytes]:
    """Start the command under torchrun; its console goes to a file."""
    words = command(workers, arguments)
    if script is not None:
        (folder / "script.py").write_text(script)
        words[words.index("distill.generate") - 1 :] = ["script.py", *arguments]
    with (folder / "console").open("wb") as console:
        return subprocess.Popen(
            words, cwd=folder, env=environment(), stdout=console, stderr=console, start_new_session=True
        )


def commits(server: Server, name: str) -> int:
    import obstore

    return sum(
        found["path"].startswith("c/") for part in obstore.list(server.bucket(f"{name}/commits")) for found in part
    )


def stored(server: Server, name: str, folder: Path) -> dict[str, str]:
    return tree(server.download(name, folder))


@pytest.mark.timeout(600)
def test_four_workers_through_outages_write_the_local_bytes(
    s3: Server, expected: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    arguments = [*expected[0], "store.path=s3://bucket/outages.zarr", *s3.arguments]
    run = begin(tmp_path, [*arguments, "store.options.client_options.read_timeout=2s"], 4)
    console = tmp_path / "console"
    wait_for(lambda: commits(s3, "outages.zarr") > 4, console.read_text)
    s3.freeze()
    wait_for(lambda: has(console, "no answer in time; trying again for up to 300 s"), console.read_text, 30)
    s3.thaw()
    wait_for(lambda: has(console, "s3://bucket/outages.zarr is back"), console.read_text, 30)
    s3.kill()
    words = [f"{why}; trying again for up to 300 s" for why in ("connection refused", "the connection was lost")]
    wait_for(lambda: any(has(console, each) for each in words), console.read_text, 30)
    time.sleep(5)
    s3.restart()
    assert run.wait(timeout=240) == 0, console.read_text()
    assert "Traceback" not in console.read_text()
    assert console.read_text().count("is back, after") == 2
    assert stored(s3, "outages.zarr", tmp_path / "found") == expected[1]


@pytest.mark.timeout(600)
def test_one_run_at_a_time_and_a_killed_one_goes_on(
    s3: Server, expected: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    arguments = [*expected[0], "store.path=s3://bucket/killed.zarr", *s3.arguments]
    run = begin(tmp_path, arguments, 2)
    wait_for(lambda: commits(s3, "killed.zarr") > 1, (tmp_path / "console").read_text)
    workers = sorted(children(run.pid))
    os.kill(workers[1], signal.SIGSTOP)  # the run cannot end meanwhile
    (tmp_path / "second").mkdir()
    second = generate(tmp_path / "second", *arguments)
    assert second.returncode == 2, second.stderr
    assert second.stderr.splitlines()[-1] == (
        "error: store.path: another run is writing s3://bucket/killed.zarr; wait for it, or stop it"
    )
    for pid in [run.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    run.wait()
    before = commits(s3, "killed.zarr")
    assert 0 < before < len([name for name in expected[1] if name.startswith("commits/c/")])
    resumed = generate(tmp_path / "second", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "the run that was writing s3://bucket/killed.zarr is gone: going on in its place" in resumed.stderr
    assert f"{before} of " in resumed.stderr
    assert stored(s3, "killed.zarr", tmp_path / "found") == expected[1]
    again = generate(tmp_path / "second", *arguments)
    assert again.returncode == 0
    assert "complete already" in again.stderr


@pytest.mark.timeout(600)
def test_a_server_that_stays_away_ends_the_run_with_one_message(
    s3: Server, expected: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    arguments = [*expected[0], "store.path=s3://bucket/away.zarr", *s3.arguments]
    run = begin(tmp_path, arguments, 2, IMPATIENT)
    console = tmp_path / "console"
    wait_for(lambda: commits(s3, "away.zarr") > 1, console.read_text)
    s3.kill()
    assert run.wait(timeout=90) == 1, console.read_text()
    s3.restart()
    (said,) = [line for line in console.read_text().splitlines() if "error: store: cannot " in line]
    assert "in s3://bucket/away.zarr: connection refused (tried for " in said
    assert said.endswith("what is committed stays, and the same command continues from there")
    assert console.read_text().count("Traceback") <= 1, "torchrun's own"
    ran = generate(tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert stored(s3, "away.zarr", tmp_path / "found") == expected[1]


MISTAKES = {
    "key": ("access_key_id=wrong", "bucket", "The access key ID you provided does not exist in our records"),
    "bucket": ("region=us-east-1", "nowhere", "The specified bucket does not exist (NoSuchBucket)"),
    "server": ("endpoint=http://127.0.0.1:9", "bucket", "connection refused"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_everywhere(
    mistake: str, s3: Server, expected: tuple[list[str], dict[str, str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    option, bucket, words = MISTAKES[mistake]
    name, value = option.split("=")
    path, options = f"s3://{bucket}/x.zarr", {**s3.options, name: value}
    given = [options_file(tmp_path / "options.yaml", options)]
    train = subprocess.Popen(
        [sys.executable, "-m", "distill.train", f"store.path={path}", "device=cpu", *given],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.monotonic()
    with pytest.raises(StoreError) as raised:
        TeacherCache(path, options)
    assert time.monotonic() - began < 12
    assert verify.main([path, *given]) == 2
    checked = capsys.readouterr().err
    assert inspect.main([path, *given]) == 2
    ran = generate(tmp_path, *expected[0], f"store.path={path}", *given)
    said = train.communicate(timeout=120)[1]
    assert (ran.returncode, train.returncode) == (2, 2)
    for console in (f"error: {raised.value}\n", checked, capsys.readouterr().err, ran.stderr, said):
        lines = [line for line in console.splitlines() if "error: " in line]
        assert lines == [f"error: store.path: cannot use {path}: {words}" + lines[0].partition(words)[2]], console
        assert console.splitlines()[-1] == lines[0]
        assert len(lines[0]) < 200
        assert "Traceback" not in console
        assert s3.options["secret_access_key"] not in console


@pytest.mark.timeout(600)
def test_training_from_a_bucket_is_training_from_a_folder(s3: Server, small_store: Path, tmp_path: Path) -> None:
    """With readers, which open the store themselves, and a server that is away for a while."""
    s3.upload(small_store, "small.zarr")
    remote, local = TeacherCache("s3://bucket/small.zarr", s3.options), TeacherCache(str(small_store))
    assert len(remote) == len(local)
    for sample in (0, len(local) // 2, len(local) - 1):
        torch.testing.assert_close(remote[sample], local[sample], rtol=0, atol=0, equal_nan=True)
    batches = [DataLoader(cache.shuffled(8), batch_size=None, num_workers=0) for cache in (remote, local)]
    for ours, theirs in zip(*batches, strict=True):
        assert all(ours[name].equal(theirs[name]) for name in theirs)

    def train(output: str, store: list[str], interrupted: bool) -> list[float]:
        arguments = [*store, "student.layers=2", "batch.samples=2", "optimizer.steps=40", "evaluation.samples=0"]
        arguments += ["batch.readers=2", "batch.window_blocks=1", "device=cpu", f"output={output}"]
        with (tmp_path / output).with_suffix(".log").open("wb") as console:
            run = subprocess.Popen(
                [sys.executable, "-m", "distill.train", *arguments], cwd=tmp_path, env=environment(),
                stdout=console, stderr=console,
            )  # fmt: skip
        log, figures = tmp_path / f"{output}.log", tmp_path / output / "metrics.jsonl"
        if interrupted:
            wait_for(lambda: figures.is_file() and figures.read_text(), log.read_text)
            s3.kill()
            time.sleep(2)
            s3.restart()
        assert run.wait(timeout=120) == 0, log.read_text()
        return [json.loads(line)["loss"] for line in figures.read_text().splitlines()]

    from_bucket = train("bucket", ["store.path=s3://bucket/small.zarr", *s3.arguments], interrupted=True)
    assert len(from_bucket) == 40
    assert from_bucket == train("folder", [f"store.path={small_store}"], interrupted=False)
