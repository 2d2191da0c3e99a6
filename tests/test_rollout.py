"""The real command: the same bytes by any number of workers and after kills, and a teacher asked about each id."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import ConfigError, DataError, StorageError, StoreError
from distill.reading.cache import TeacherCache
from distill.store.writable import WritableStore
from tests.processes import children
from tests.rollouts.support import command, roll_out, rows_of, run, write
from tests.support import (
    environment,
    generate_here,
    make_tokenizer,
    open_raw,
    remount,
    save_model,
    small_disk,
    tree,
    wait_for,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "student", chat=True, vocab_size=300)


@pytest.fixture(scope="module")
def settings(student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of 42 rollouts of 14 prompts of 2 to 15 tokens, a part for each prompt; a fifteenth is empty."""
    rows: list[dict[str, Any]] = [{"prompt": "ab" * (1 + i % 5) + "c" * (i % 7)} for i in range(14)] + [{"prompt": ""}]
    path = write(tmp_path_factory.mktemp("prompts") / "x.jsonl", rows)
    found = [f"student.model={student}", f"prompts.path={path}", "sampling.n=3", "sampling.max_new_tokens=48"]
    return [*found, "batch.part_prompts=1", "batch.sequences=2"]


@pytest.fixture(scope="module")
def expected(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run by one worker."""
    folder = tmp_path_factory.mktemp("expected")
    roll_out(*settings, f"output={folder / 'out'}", f"log_dir={folder / 'logs'}")
    return folder / "out"


def test_columns(expected: Path, student: Path) -> None:
    rows, tokenizer = rows_of(expected), make_tokenizer()
    numbers = [(row["prompt_number"], row["sample_number"]) for row in rows]
    assert numbers == [(i, n) for i in range(14) for n in range(3)]
    for row in rows:
        number = row["prompt_number"]
        assert tokenizer.decode(row["prompt_ids"]) == "ab" * (1 + number % 5) + "c" * (number % 7)
        assert len(row["completion_ids"]) == len(row["logprobs"])
        assert all(logprob < 0 for logprob in row["logprobs"])
        assert row["finished"] == (row["completion_ids"][-1] == 2)
        said = row["completion_ids"][: -1 if row["finished"] else None]
        assert row["completion_text"] == tokenizer.decode(said)
    assert len({tuple(row["completion_ids"]) for row in rows}) == len(rows)
    manifest = json.loads((expected / "rollouts.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("distill-rollouts", 1)
    assert (manifest["parts"], manifest["prompts"]) == (14, 14)
    assert manifest["tokenizer"] == {
        "vocab_size": len(tokenizer),
        "vocab_digest": manifest["tokenizer"]["vocab_digest"],
    }
    assert not list(expected.rglob("*.partial"))


def test_other_batches_write_the_same(expected: Path, settings: list[str], tmp_path: Path) -> None:
    rows = roll_out(
        *settings, f"output={tmp_path / 'out'}", f"log_dir={tmp_path}", "batch.sequences=64", "batch.part_prompts=4"
    )
    for one, other in zip(rows_of(expected), rows, strict=True):
        assert np.allclose(one.pop("logprobs"), other.pop("logprobs"), atol=1e-4)
        assert one == other
    other_parts = ["batch.part_prompts=5", "sampling.n=1", f"output={tmp_path / 'fewer'}", f"log_dir={tmp_path}"]
    first = [row["completion_ids"] for row in rows if row["sample_number"] == 0]
    assert [row["completion_ids"] for row in roll_out(*settings, *other_parts)] == first


def test_a_kill_in_the_middle_loses_and_repeats_nothing(expected: Path, settings: list[str], tmp_path: Path) -> None:
    """Two workers are killed in the middle; one finishes; then there is nothing to do."""
    out, console = tmp_path / "out", tmp_path / "console"
    arguments = [*settings, "output=out"]
    with console.open("wb") as stream:
        launcher = subprocess.Popen(
            command(2, arguments), cwd=tmp_path, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )
        wait_for(lambda: list(out.glob("part_*.parquet")), console.read_text)
        workers = children(launcher.pid)
        for pid in [launcher.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        launcher.wait(timeout=30)
    there = {name: file for name, file in tree(out).items() if name.endswith(".parquet")}
    assert 0 < len(there) < 14, "the kill came too late"
    assert there.items() <= tree(expected).items()
    ran = run(tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert tree(out) == tree(expected)
    logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("worker_*.log"))
    finished = sorted(int(part) for part in re.findall(r"part (\d+) is finished", logs))
    assert finished == sorted({*finished}), "a part was written twice"
    for word in ("prompts     14", "rollouts    42, ", "a rollout on average", "perplexity", "tokens/s", "next"):
        assert word in ran.stderr
    again = run(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert "out is complete already: nothing to do" in again.stderr
    assert tree(out) == tree(expected)


def test_two_workers_write_the_same_bytes(expected: Path, settings: list[str], tmp_path: Path) -> None:
    ran = run(tmp_path, *settings, "output=out", workers=2)
    assert ran.returncode == 0, ran.stderr
    assert tree(tmp_path / "out") == tree(expected)
    assert "rollouts: 100%" in ran.stderr


def test_what_a_run_refuses(expected: Path, settings: list[str], student: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has another run's rollouts; choose another folder, or delete it") as found:
        roll_out(*settings, f"output={expected}", f"log_dir={tmp_path}", "sampling.seed=1", "sampling.stop=[9]")
    assert "sampling.seed: the folder has 0, this run 1" in str(found.value)
    assert "sampling.stop: the folder has [2], this run [2, 9]" in str(found.value)
    assert len(str(found.value).splitlines()) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        roll_out(*settings, f"output={tmp_path / 'other'}", f"log_dir={tmp_path}")
    for bad, said in (("temperature=0", "temperature > 0"), ("top_p=1.5", "at most 1"), ("n=0", "at least 1")):
        ran = run(tmp_path, f"sampling.{bad}")
        assert ran.returncode == 2
        assert said in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_a_teacher_is_asked_about_each_id(expected: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """distill.generate takes the folder: ids as they are, trained on where the student wrote, with its own logprobs."""
    teacher = save_model("llama", tmp_path / "teacher", vocab_size=300, num_hidden_layers=2)
    store = generate_here(
        tmp_path, f"teacher.model={teacher}", f"dataset.path={expected}", f"store.path={tmp_path}/x.zarr"
    )
    cache, rows = TeacherCache(str(store)), rows_of(expected)
    index = open_raw(store, "sample_index")
    assert sorted(index) == list(range(len(rows)))
    for i, sample in enumerate(cache):
        row = rows[index[i]]
        asked, written = len(row["prompt_ids"]), len(row["completion_ids"])
        assert sample["tokens"].tolist() == row["prompt_ids"] + row["completion_ids"]
        assert sample["loss_mask"].tolist() == [False] * (asked - 1) + [True] * written + [False]
        found = sample["sampled_logprob"][asked - 1 : -1].numpy()
        assert np.allclose(found, row["logprobs"], atol=4e-3)  # float16
    unfinished = tmp_path / "unfinished"
    shutil.copytree(expected, unfinished)
    (unfinished / "part_000003.parquet").unlink()
    with pytest.raises(DataError, match=r"expected 14 parts of rollouts in .*, found 13: run distill\.rollout again"):
        generate_here(
            tmp_path, f"teacher.model={teacher}", f"dataset.path={unfinished}", f"store.path={tmp_path}/y.zarr"
        )
    assert "another tokenizer" not in caplog.text
    manifest = json.loads((unfinished / "rollouts.json").read_text())
    manifest["tokenizer"]["vocab_digest"] = "another"
    (unfinished / "rollouts.json").write_text(json.dumps(manifest | {"parts": 13}))
    generate_here(tmp_path, f"teacher.model={teacher}", f"dataset.path={unfinished}", f"store.path={tmp_path}/y.zarr")
    assert "was written with another tokenizer than the teacher's" in caplog.text


def test_generate_is_stopped_in_the_middle_of_rollouts(
    expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plan has written of them, and what the teacher said, is what an undisturbed run writes."""
    teacher = save_model("llama", tmp_path / "teacher", vocab_size=300, num_hidden_layers=1)
    rollouts = shutil.copytree(expected, tmp_path / "rollouts")
    settings = [f"teacher.model={teacher}", f"dataset.path={rollouts}", "store.block_rows=1024", "capture.k=8"]
    whole = generate_here(tmp_path, *settings, f"store.path={tmp_path}/whole.zarr")
    commit = WritableStore.commit

    def stopped(store: WritableStore, block: int, num_rows: int) -> None:
        if store.committed().any():
            raise KeyboardInterrupt
        commit(store, block, num_rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WritableStore, "commit", stopped)
        generate_here(tmp_path, *settings, f"store.path={tmp_path}/x.zarr")
    gc.collect()  # with the store goes its lock
    first = rollouts / "part_000001.parquet"
    kept = first.read_bytes()
    first.write_bytes((rollouts / "part_000002.parquet").read_bytes())
    with pytest.raises(StoreError, match="unfinished store of another run"):
        generate_here(tmp_path, *settings, f"store.path={tmp_path}/x.zarr")
    gc.collect()
    first.write_bytes(kept)
    assert 0 < (open_raw(tmp_path / "x.zarr", "commits") >= 0).mean() < 1
    generate_here(tmp_path, *settings, f"store.path={tmp_path}/x.zarr")
    assert tree(tmp_path / "x.zarr") == tree(whole)


def test_a_full_disk(expected: Path, settings: list[str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "40k") as disk:
        arguments = [*settings, f"output={disk / 'out'}", f"log_dir={tmp_path}"]
        with pytest.raises(StorageError, match=r"^output: cannot write .*\.parquet: No space left on device$"):
            roll_out(*arguments)
        assert not list(disk.rglob("*.partial"))
        there = {name: file for name, file in tree(disk / "out").items() if name.endswith(".parquet")}
        assert there.items() < tree(expected).items()
        remount(disk, "size=8m")
        roll_out(*arguments)
        assert tree(disk / "out") == tree(expected)


def test_a_turn_that_ends_no_rollout_is_told(student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base model's tokenizer may end texts otherwise than its chat template ends turns."""
    path = write(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "2 + 2?"}]}])
    settings = [f"student.model={student}", f"prompts.path={path}", f"log_dir={tmp_path}", "sampling.max_new_tokens=4"]
    said = "the chat template ends a turn with '<|end|>', which ends no rollout: sampling.stop=[5]"
    roll_out(*settings, f"output={tmp_path / 'a'}")
    assert said in caplog.text
    caplog.clear()
    roll_out(*settings, f"output={tmp_path / 'b'}", "sampling.stop=[5]")
    assert "ends a turn" not in caplog.text
