"""What `distill.verify` checks beside checksums: the rules that rows and the sample table keep, whoever wrote them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch

from distill.store.soundness import BlockCheck
from distill.store.writable import WritableStore
from distill.teacher.capture import as_float16, round_logprobs
from distill.teacher.sample import uniforms
from distill.verify import main
from tests.captured import sample
from tests.store.seaweedfs import Server
from tests.support import tree

Rows = dict[str, Any]
ATTRIBUTES = {
    "method": "topk",
    "k": 5,
    "temperatures": [2.0, 1.0],
    "vocab_size": 50,
    "block_rows": 32,
    "num_blocks": 4,
    "num_samples": 8,
    "num_tokens": 80,
    "config": {},
    "fingerprint": "made up",
}


def made_up() -> Rows:
    """What a teacher says of 20 rows in use, over 50 ids, as it is stored."""
    logits = np.random.default_rng(0).normal(0, 3, (20, 50))
    logits[3, 4] += 9  # the token that follows is kept
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :5]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    tail = np.log1p(-np.exp(kept).sum(axis=1, keepdims=True))
    following = np.append(logprobs[np.arange(19), np.arange(1, 20)], np.nan)
    following[9] = np.nan  # two samples of 10 tokens; token t is t
    return {
        "target_ids": ids.astype(np.int32),
        "target_logprobs": round_logprobs(kept.astype(np.float32)),
        "logsumexp": np.ones((20, 2), np.float32),
        "tail_logprob": round_logprobs(np.concatenate([tail - 1, tail], axis=1).astype(np.float32)),
        "next_logprob": following.astype(np.float16),
    }


def made_up_sample() -> Rows:
    """The same of a store of samples: 20 rows over 50 ids, at most 5 of them kept or drawn, one row certain."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[4, 9] += 60
    following = torch.arange(1, 21)
    following[[9, 19]] = -1
    found = sample(logits, 5, torch.from_numpy(uniforms(0, 0, 20)), following)
    return {
        "target_ids": found.target_ids.numpy(),
        "target_logprobs": round_logprobs(found.target_logprobs.numpy()),
        "logsumexp": found.logsumexp.numpy(),
        "tail_logprob": round_logprobs(found.tail_logprob.numpy()),
        "next_logprob": as_float16(found.next_logprob.numpy()),
    }


def write(
    path: Path, rows: Rows, tokens: Any = None, lengths: Any = None, block: int = 2, whole: Rows | None = None
) -> Path:
    """A complete store of 4 blocks, with these `rows` and `tokens` in one of them, and `whole` in the others."""
    method: Rows = {"method": "sample", "temperatures": [1.0]} if rows["tail_logprob"].shape[1] == 1 else {}
    store = WritableStore.create(str(path), {}, ATTRIBUTES | method, planned=["tokens"], codec="portable")
    store.write_all("sample_start", np.array([0, 10, 32, 42, 64, 74, 96, 106]))
    store.write_all("sample_length", np.full(8, 10, np.int32) if lengths is None else np.array(lengths, np.int32))
    store.write_all("sample_index", np.arange(8))
    for i in range(4):
        store.write_rows("tokens", i, np.arange(20) if tokens is None or i != block else tokens)
    store.publish()
    for i in range(4):
        for name, values in (rows if i == block else whole or made_up()).items():
            store.write_rows(name, i, values)
        store.commit(i, 20)
    store.mark_complete()
    return path


def test_a_sound_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x.zarr", made_up())
    before = tree(tmp_path)
    assert main([str(tmp_path / "x.zarr")]) == 0
    assert "complete and sound: 4 of 4 blocks are committed, 80 tokens" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_a_token_that_the_teacher_never_says_is_sound(tmp_path: Path) -> None:
    """Where the kept ids have all of the mass, nothing is left for any other token."""
    rows = made_up()
    rows["target_logprobs"][5] = round_logprobs(np.log(np.full(5, 0.2, np.float32)))
    rows["tail_logprob"][5] = rows["next_logprob"][5] = -np.inf
    assert 6 not in rows["target_ids"][5]
    assert main([str(write(tmp_path / "x.zarr", rows))]) == 0


def changed(name: str, at: Any, value: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[name][at] = value

    return change


def swapped(name: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[name][:] = rows[name][:, ::-1].copy()

    return change


RULES = {
    "target_ids: an id is outside the vocabulary": changed("target_ids", (7, 2), 50),
    "target_ids: an id is there twice": lambda rows: changed("target_ids", (7, 2), rows["target_ids"][7, 4])(rows),
    "target_logprobs: a log-probability is above 0": changed("target_logprobs", (0, 0), 0.5),
    "target_logprobs: not in descending order": swapped("target_logprobs"),
    "tail_logprob: a log-probability is above 0": changed("tail_logprob", (19, 0), 0.01),
    "tail_logprob: .* no number": changed("tail_logprob", (19, 1), np.nan),
    "logsumexp: not finite": changed("logsumexp", (3, 1), np.inf),
    "next_logprob: a log-probability is above 0": changed("next_logprob", 3, 0.01),
    "next_logprob: one where no token follows": changed("next_logprob", 9, -1),
    "next_logprob: .* none where one does": changed("next_logprob", 3, np.nan),
    "next_logprob: not what target_logprobs": changed("next_logprob", 3, -9),
    "next_logprob: not what .* tail_logprob say": changed("next_logprob", 5, -0.001),
    "the probabilities do not add up to 1": lambda rows: rows["tail_logprob"].__isub__(np.float16(0.25)),
}


def at_drawn(rows: Rows, row: int) -> int:
    """The first place of a drawn id in a row with two of them at least."""
    drawn = np.isnan(rows["target_logprobs"][row]) & (rows["target_ids"][row] >= 0)
    assert drawn.sum() >= 2
    return int(drawn.argmax())


def shuffled_draws(rows: Rows) -> None:
    at = at_drawn(rows, 3)
    rows["target_ids"][3, at : at + 2] = rows["target_ids"][3, at : at + 2][::-1].copy()


def without_draws(rows: Rows) -> None:
    rows["target_ids"][3, at_drawn(rows, 3) :] = -1


RULES_OF_SAMPLES = {
    "target_ids: an id is outside the vocabulary": changed("target_ids", (7, 1), -2),
    "target_ids: an id is there twice": lambda rows: changed("target_ids", (3, 1), rows["target_ids"][3, 0])(rows),
    "target_ids: an id after the end of its row": changed("target_ids", (3, 1), -1),
    "target_ids: drawn ones not in ascending order": shuffled_draws,
    "target_logprobs: a log-probability without an id, or after a drawn one": changed("target_logprobs", (4, 3), -9.0),
    "target_logprobs: none in a row": changed("target_logprobs", (3, 0), np.nan),
    "tail_logprob: nothing was drawn of it": without_draws,
    "the probabilities do not add up to 1": lambda rows: rows["tail_logprob"].__isub__(np.float16(0.25)),
}


@pytest.mark.parametrize("rule", RULES_OF_SAMPLES)
def test_each_rule_of_a_sample_is_checked(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up_sample()
    assert (rows["target_ids"][4] >= 0).sum() == 1
    RULES_OF_SAMPLES[rule](rows)
    assert main([str(write(tmp_path / "x.zarr", rows, whole=made_up_sample()))]) == 1
    out = capsys.readouterr().out
    assert re.search(f"block 2: .*{rule}", out), out
    assert "block 1:" not in out
    assert main([str(write(tmp_path / "sound.zarr", made_up_sample(), whole=made_up_sample()))]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_checked(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up()
    RULES[rule](rows)
    path = str(write(tmp_path / "x.zarr", rows))
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert re.search(f"block 2: .*{rule}", out), out
    assert "block 1:" not in out
    assert main([path, "--repair"]) == 1
    assert "took back 1 blocks" in capsys.readouterr().out
    assert main([path]) == 1
    assert "sound, but unfinished: 3 of 4 blocks are committed" in capsys.readouterr().out


def test_the_sample_table_keeps_its_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {
        "a sample has no rows": [10, 0, 10, 10, 10, 10, 10, 10],
        "samples overlap": [11, 10, 10, 10, 10, 10, 10, 10],
        "a sample is in two blocks": [10, 23, 10, 10, 10, 10, 10, 10],
        "the attribute num_tokens says otherwise": [10, 9, 10, 10, 10, 10, 10, 10],
    }
    for i, (rule, lengths) in enumerate(tables.items()):
        path = write(tmp_path / f"{i}.zarr", made_up(), lengths=lengths)
        assert main([str(path)]) == 1
        assert rule in capsys.readouterr().out
    path = write(tmp_path / "tokens.zarr", made_up(), tokens=np.full(20, 50))
    before = tree(tmp_path)
    for arguments in ([str(path)], [str(path), "--repair"]):  # it was made so: nothing takes it back
        assert main(arguments) == 1
        assert "block 2: tokens: an id is outside the vocabulary" in capsys.readouterr().out
    assert tree(tmp_path) == before
    path = write(tmp_path / "rows.zarr", made_up())
    store = WritableStore.existing(str(path), {})
    store.write_rows("target_ids", 2, made_up()["target_ids"])
    for name in ("target_logprobs", "logsumexp", "tail_logprob", "next_logprob"):
        store.write_rows(name, 2, made_up()[name])
    store.commit(2, 21)
    assert main([str(path)]) == 1
    assert "block 2: commits says 21 rows, its samples have 20" in capsys.readouterr().out


def test_what_cannot_be_repaired_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.zarr", made_up())
    files = (path / "zarr.json", path / "commits" / "zarr.json")
    for old, new, status, message in (
        ("made up", "made uq", 1, "there is no copy of its attributes in commits/zarr.json"),
        ('"digest"', '"digost"', 2, "found none: an older distill made it"),
        ('"version": 1', '"version": 2', 2, "expected format version 1"),
    ):
        before = [file.read_text() for file in files]
        for file in files:
            file.write_text(file.read_text().replace(old, new))
        for arguments in ([str(path)], [str(path), "--repair"]):
            assert main(arguments) == status
            said = capsys.readouterr()
            assert message in said.out + said.err
            assert "takes it back" not in said.out + said.err
        for file, text in zip(files, before, strict=True):
            file.write_text(text)
    files[0].unlink()
    assert main([str(path), "--repair"]) == 0, "all blocks are sound: it is complete again"
    assert files[0].read_text() == before[0]
    for arguments in (["--repare", str(path)], [str(path), "--repair", "--teacher"]):
        assert main(arguments) == 2
    WritableStore.create(str(tmp_path / "begun"), {}, ATTRIBUTES, planned=["tokens"], codec="portable")
    assert main([str(tmp_path / "begun")]) == 1
    assert "its plan was interrupted; give the command that makes it again" in capsys.readouterr().out
    for arguments, message in (([], "expected one store, found 0"), ([str(tmp_path / "nothing")], "found no store at")):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--repair" in capsys.readouterr().out


def test_a_bucket_is_verified_and_repaired_as_a_folder(
    s3: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.upload(write(tmp_path / "x.zarr", made_up()), "sound.zarr")
    given, client = ["s3://bucket/sound.zarr", *s3.arguments], s3.bucket("sound.zarr")
    assert main(given) == 0
    for key in ("target_ids/c/3/0", "tokens/zarr.json"):
        obstore.delete(client, key)
    obstore.put(client, "commits/c/1", b"")
    assert main(given) == 1
    assert "tokens/zarr.json is missing" in capsys.readouterr().out
    assert main([*given, "--repair"]) == 1
    assert "took back 2 blocks and 0 chunks of the plan" in capsys.readouterr().out
    assert main(given) == 1
    assert "sound, but unfinished: 2 of 4 blocks are committed" in capsys.readouterr().out
    assert not any("lease" in found["path"] for batch in obstore.list(client) for found in batch)


def test_several_processes_find_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_up()
    RULES["logsumexp: not finite"](rows)
    path = write(tmp_path / "x.zarr", rows)
    (path / "target_ids/c/0/0").unlink()
    (path / "tokens/c/3").write_bytes(b"")
    assert main([str(path)]) == 1
    alone = capsys.readouterr().out
    assert alone.count("\n  ") == 3
    monkeypatch.setattr("distill.verify._ROWS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(BlockCheck, "problems", None)  # in this process
    assert main([str(path)]) == 1
    assert capsys.readouterr().out == alone
