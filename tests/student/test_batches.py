"""What the steps of a run read, on machines as people have them: long TMPDIR, few descriptors, a small /dev/shm."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import TeacherCache
from distill.config.train import (
    EvaluationConfig,
    OptimizerConfig,
    StoresConfig,
    StudentConfig,
    TrainBatchConfig,
    TrainConfig,
)
from distill.errors import ConfigError, ReaderError, StorageError, StoreError, UserError
from distill.run.grid import Grid
from distill.student.batches import StepBatches, open_caches, split
from distill.student.model import find
from tests.processes import children
from tests.support import environment

CPU = torch.device("cpu")


def steps_of(store: Path, readers: int, samples: int, accumulate: int = 1) -> Any:
    batch = TrainBatchConfig(readers=readers, samples=samples, accumulate=accumulate)
    config = TrainConfig(store=StoresConfig(path=str(store)), batch=batch, optimizer=OptimizerConfig(epochs=2))
    return StepBatches(open_caches(config), config, Grid()).read(0, CPU)


def test_many_batches_are_held_with_few_descriptors(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 150 micro-batches, where TMPDIR is too long for a socket; two epochs of them, and their values."""
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, hard))
    try:
        found = list(islice(steps_of(small_store, 2, accumulate=150, samples=4), 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(step) for step in found] == [150, 146, 150, 146]
    epochs = [[*found[at], *found[at + 1]] for at in (0, 2)]
    seen = [sorted(i for batch in batches for i in batch["sample"].tolist() if i >= 0) for batches in epochs]
    cache = TeacherCache(str(small_store))
    assert seen[0] == seen[1] == list(range(len(cache)))
    for batch in found[3][::40]:
        for row, number in enumerate(batch["sample"].tolist()):
            sample = cache[number]
            length = len(sample["tokens"])
            assert batch["input_ids"][row, :length].equal(sample["tokens"])
            assert batch["target_logprobs"][row, :length].equal(sample["target_logprobs"])


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"was ended by SIGKILL; .* for want of memory: fewer batch\.readers"),
        (signal.SIGBUS, r"was ended by SIGBUS; /dev/shm may be full.*--shm-size, or batch\.readers=0"),
    ],
)
def test_a_reader_that_is_gone_is_told_at_once(number: int, told: str, small_store: Path) -> None:
    before = set(children(os.getpid()))
    steps = steps_of(small_store, 1, samples=1)
    next(steps)
    (reader,) = set(children(os.getpid())) - before
    os.kill(reader, number)
    killed = time.monotonic()
    with pytest.raises(ReaderError, match=rf"a reader \(process {reader}\) {told}"):
        list(steps)
    assert time.monotonic() - killed < 4


@pytest.mark.parametrize("readers", [0, 2])
def test_a_mixture_goes_on_from_every_step(readers: int, small_store: Path, sampled_store: Path) -> None:
    """Three epochs, of other samples each, in steps of three micro-batches, as the second of two workers."""
    caches = [TeacherCache(str(small_store))[:40], TeacherCache(str(sampled_store))[:70]]
    batch = TrainBatchConfig(readers=readers, samples=4, accumulate=3, window_blocks=2)
    config = TrainConfig(batch=batch, optimizer=OptimizerConfig(epochs=3))

    def steps(first: int) -> list[Any]:
        """As a new process has them."""
        batches = StepBatches(TeacherCache.mix(caches, [2.0, 1.0]), config, Grid(rank=1, world_size=2))
        assert batches.total_steps == 9
        return list(batches.read(first, CPU))

    def equal(one: Any, other: Any) -> bool:
        names = one.keys() == other.keys()
        return names and all(one[name].nan_to_num().equal(other[name].nan_to_num()) for name in one)

    whole = steps(0)
    assert len({str(sorted(b["sample"].tolist() for b in step)) for step in whole}) == 9
    for first in range(1, 10) if readers == 0 else (2, 4):
        found = steps(first)
        assert [len(step) for step in found] == [len(step) for step in whole[first:]]
        for step, expected in zip(found, whole[first:], strict=True):
            assert all(equal(one, other) for one, other in zip(step, expected, strict=True))


def test_a_list_of_one_store_is_that_store(small_store: Path, sampled_store: Path) -> None:
    one, listed, weighed, two = (
        open_caches(TrainConfig(store=StoresConfig(path, weights)))
        for path, weights in (
            (str(small_store), None), ([str(small_store)], None), ([str(small_store)], [0.3]),
            ([str(small_store), str(sampled_store)], [3.0, 1.0]),
        )
    )  # fmt: skip
    assert type(one) is type(listed) is type(weighed) is TeacherCache
    assert one.identity == listed.identity == weighed.identity == {"store": one.attributes["fingerprint"]}
    assert two.per_epoch == [1177, 392]
    with pytest.raises(ConfigError, match=r"^store\.weights: expected a number > 0 for each of"):
        open_caches(TrainConfig(store=StoresConfig([str(small_store), str(sampled_store)], [1.0])))
    with pytest.raises(ConfigError, match=r"^store\.path: expected different stores to mix"):
        open_caches(TrainConfig(store=StoresConfig([str(small_store)] * 2)))
    with pytest.raises(
        ConfigError, match=r"^student\.model: expected a folder or an id, since the stores' teachers are"
    ):
        find(StudentConfig(), *(part.attributes["teacher"] for part in two.parts))
    with pytest.raises(ConfigError, match=r"^evaluation\.samples: expected to leave some of the 1,177 samples of "):
        split(two, TrainConfig(evaluation=EvaluationConfig(samples=4000)))


_READ = """
import sys
from pathlib import Path
from tests.student.test_batches import steps_of
step = next(steps_of(sys.argv[1], 1, accumulate=5, samples=200))
print(sum(values.numel() * values.element_size() for batch in step for values in batch.values()))
"""


def test_a_store_that_fails_a_reader_is_told_in_its_words(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the reader's traceback; and as what it is: an outage (status 1), not bad input (status 2)."""
    steps = steps_of(small_store, readers=1, samples=2)

    async def get(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zarr.storage.LocalStore.get", get)  # before the reader is forked
    with pytest.raises(StorageError) as raised:
        next(steps)
    assert str(raised.value).count("\n") == 0, raised.value
    assert "Input/output error" in str(raised.value)


def test_a_small_shared_memory(small_store: Path) -> None:
    """A container's /dev/shm, smaller than a batch."""
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", _READ, str(small_store)],
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 4 << 20


def test_readers_behind_a_forkserver_where_tmpdir_is_long(small_store: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':{_READ.replace(chr(10), chr(10) + '    ')}")
    ran = subprocess.run(
        [sys.executable, str(script), f"file://{small_store}"], env={**environment(), "TMPDIR": str(long)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 4 << 20


def test_headers_for_one_server_are_not_sent_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any store is opened: each would be asked with the same headers."""

    def opened(path: str, options: Any) -> None:
        raise StoreError("opened")

    monkeypatch.setattr("distill.student.batches.TeacherCache", opened)
    private: dict[str, Any] = {"client_options": {"default_headers": {"Authorization": "Bearer for-a-only"}}}
    cases: tuple[tuple[str, str, dict[str, Any], str], ...] = (
        ("https://a.org/x", "https://b.org/y", private, r"^store\.options\.client_options\.default_headers: expected"),
        ("https://a.org/x", "http://a.org/y", private, "found some with https://a.org and http://a.org"),
        ("https://a.org/x", "s3://b/y", private, "found some with https://a.org and s3:"),
        ("https://a.org/x", "https://A.org/y", private, "opened"),
        ("https://a.org/x", "y.zarr", private, "opened"),
        ("s3://a/x", "s3://b/y", private, "opened"),
        ("https://a.org/x", "https://b.org/y", {"client_options": {"timeout": "9s"}}, "opened"),
    )
    for one, other, options, words in cases:
        with pytest.raises(UserError, match=words) as refused:
            open_caches(TrainConfig(store=StoresConfig([one, other], options=options)))
        assert "for-a-only" not in str(refused.value)
