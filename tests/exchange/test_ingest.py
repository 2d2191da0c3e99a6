"""What others captured becomes a store: the values, what is unknown, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from distill.errors import ConfigError, DataError, TeacherError
from distill.inspect import main as inspect
from distill.reading.cache import TeacherCache
from distill.reading.samples import collate
from distill.store.store import Store
from distill.student.evaluate import measured
from distill.student.learner import Learner
from distill.student.loss import DistillationLoss
from distill.student.model import check
from distill.verify import main as verify
from tests.exchange.support import CHATS, TEXTS, captured, export_here, ingest_here, table, write
from tests.support import build_model, save_model, tree

K = 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "teacher", chat=True, vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer_only(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's folder without its weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in teacher.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def logprobs(teacher: Path) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Token ids of nine examples, and the teacher's log-probabilities [T, V] about the token after each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    torch.manual_seed(3)
    examples = [torch.randint(3, 260, (6 + 7 * i,)).tolist() for i in range(9)]
    with torch.no_grad():
        return examples, [model(torch.tensor([ids])).logits[0].log_softmax(dim=1) for ids in examples]


def vllm_row(ids: list[int], said: torch.Tensor, k: int = K) -> dict[str, Any]:
    """As vLLM writes it: null, then the k most probable ids of each token, and the token itself, which is first."""
    rows: list[Any] = [None]
    for t in range(1, len(ids)):
        ranks = said[t - 1].argsort(descending=True).tolist()
        entries = {}
        for i in dict.fromkeys([ids[t], *ranks[:k]]):
            entries[str(i)] = {"logprob": float(said[t - 1, i]), "rank": ranks.index(i) + 1, "decoded_token": "x"}
        rows.append(entries)
    return {"prompt_token_ids": ids, "prompt_logprobs": rows}


@pytest.fixture(scope="module")
def vllm(logprobs: tuple[list[list[int]], list[torch.Tensor]]) -> list[dict[str, Any]]:
    return [vllm_row(ids, said) for ids, said in zip(*logprobs, strict=True)]


def by_example(store: Path) -> dict[int, Any]:
    """Samples by the number of their example in the dataset."""
    cache = TeacherCache(str(store))
    return dict(zip(Store.existing(str(store), {}).read_all("sample_index").tolist(), cache, strict=True))


def sound(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(store)]) == 0, capsys.readouterr().out
    assert "complete and sound" in capsys.readouterr().out


def test_prompt_logprobs(
    vllm: list[dict[str, Any]],
    logprobs: tuple[list[list[int]], list[torch.Tensor]],
    tokenizer_only: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against the teacher's own distribution: kept ids, tail, the token that follows; then the loss."""
    rows = write(tmp_path / "rows.jsonl", vllm)
    store = ingest_here(rows, tmp_path / "x.zarr", tokenizer_only, "store.block_rows=128")
    attributes = Store.existing(str(store), {}).attributes
    assert attributes["unknown"] == ["logsumexp"]
    assert attributes["captured"]["form"] == "prompt_logprobs"
    assert (attributes["method"], attributes["k"], attributes["temperatures"]) == ("topk", K + 1, [1.0])
    assert attributes["vocab_size"] == 300
    found, student = by_example(store), build_model("qwen3", vocab_size=300)
    assert len(found) == 9
    for number, (ids, said) in enumerate(zip(*logprobs, strict=True)):
        sample = found[number]
        assert "logsumexp" not in sample
        assert sample["tokens"].tolist() == ids
        last = len(ids) - 1
        following = torch.tensor(ids[1:])
        torch.testing.assert_close(
            sample["next_logprob"][:last], said[:last].gather(1, following[:, None])[:, 0], rtol=2**-10, atol=1e-4
        )
        for t in range(last):
            top = said[t].argsort(descending=True)[:K].tolist()
            wanted = sorted({*top, ids[t + 1]}, key=lambda i: -said[t, i])
            assert sample["target_ids"][t].tolist() == [*wanted, -1][: K + 1]
            kept = said[t, wanted]
            torch.testing.assert_close(sample["target_logprobs"][t, : len(wanted)], kept, rtol=2**-6, atol=1e-4)
            left = float(torch.log1p(-kept.exp().sum()))
            assert math.isclose(float(sample["tail_logprob"][t, 0]), left, rel_tol=2**-6, abs_tol=1e-3)
        assert sample["target_ids"][last].tolist() == [-1] * (K + 1)
        assert sample["target_logprobs"][last].isnan().all()
        batch = collate([sample])
        logits = student(batch["input_ids"]).logits.detach()
        bucket = DistillationLoss().from_logits(logits, batch, [1.0])
        expected = torch.tensor(0.0)
        for t in range(last):
            kept = sample["target_ids"][t][sample["target_ids"][t] >= 0]
            p, q = said[t].softmax(0), logits[0, t].softmax(0)
            p, q = (torch.cat([x[kept], 1 - x[kept].sum(0, keepdim=True)]) for x in (p, q))
            expected += (p * (p / q).log()).sum()
        torch.testing.assert_close(bucket, expected, rtol=2e-2, atol=1e-2)
    sound(store, capsys)
    assert inspect([str(store)]) == 0
    shown = capsys.readouterr().out
    assert "captured by others, read as prompt_logprobs; unknown: logsumexp" in shown
    assert "mass of the top" in shown


def pairs(row: dict[str, Any]) -> dict[str, Any]:
    """[id, log-probability]."""
    said = [
        None if entry is None else [[int(i), one["logprob"]] for i, one in entry.items()]
        for entry in row["prompt_logprobs"]
    ]
    return {"input_ids": row["prompt_token_ids"], "prompt_logprobs": said}


def objects(row: dict[str, Any]) -> dict[str, Any]:
    """Objects with a token_id, shuffled."""
    said = [
        entry and [{"token_id": int(i), "logprob": one["logprob"]} for i, one in reversed(entry.items())]
        for entry in row["prompt_logprobs"]
    ]
    return {"input_ids": row["prompt_token_ids"], "prompt_logprobs": said}


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """{id: log-probability}, and padding on both sides."""
    said = [entry and {f"token_id:{i}": one["logprob"] for i, one in entry.items()} for entry in row["prompt_logprobs"]]
    ids = row["prompt_token_ids"]
    return {
        "input_ids": [0, 0, *ids, 0],
        "attention_mask": [0, 0, *[1] * len(ids), 0],
        "prompt_logprobs": [None, None, *said, None],
    }


@pytest.mark.parametrize("form", [pairs, objects, numbers])
def test_every_way_to_write_prompt_logprobs_is_the_same(
    vllm: list[dict[str, Any]], tokenizer_only: Path, tmp_path: Path, form: Callable[[Any], Any]
) -> None:
    expected = by_example(ingest_here(write(tmp_path / "a.jsonl", vllm), tmp_path / "a.zarr", tokenizer_only))
    rows = [form(row) for row in vllm]
    stores = [ingest_here(write(tmp_path / "b.jsonl", rows), tmp_path / "b.zarr", tokenizer_only)]
    if form is not numbers:  # Arrow would give all objects all keys
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
        stores.append(ingest_here(tmp_path / "b.parquet", tmp_path / "c.zarr", tokenizer_only))
    for store in stores:
        found = by_example(store)
        for number, sample in expected.items():
            for name in sample.keys() - {"sample"}:
                torch.testing.assert_close(found[number][name], sample[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("align", ["logits", "token"])
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "chats"])
def test_an_export_comes_back(
    rows: Any, align: str, teacher: Path, tokenizer_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit where something is learned, with the same loss; the alignment is what target_mask says."""
    store = captured(tmp_path / "first", teacher, rows, "capture.method=topk", "capture.k=7")
    out = export_here(store, tmp_path / "out", f"align={align}")
    again = ingest_here(out, tmp_path / "again.zarr", tokenizer_only, "store.block_rows=128")
    attributes = Store.existing(str(again), {}).attributes
    assert attributes["captured"]["align"] == align
    assert {*attributes["unknown"]} == {"logsumexp", "next_logprob"}
    student, first, found = build_model("qwen3", vocab_size=300), TeacherCache(str(store)), by_example(again)
    assert len(found) == len(first)
    for number, sample in enumerate(first):
        batch, other = collate([sample]), collate([found[number]])
        mask = batch["loss_mask"]
        assert (other["loss_mask"] == mask).all()
        assert (other["target_ids"][mask] == batch["target_ids"][mask]).all()
        assert (other["target_logprobs"][mask] == batch["target_logprobs"][mask]).all()
        logits = student(batch["input_ids"]).logits.detach()
        for tail, exactly in (("renormalize", 1e-6), ("bucket", 2e-2)):
            loss = DistillationLoss(tail=tail)
            torch.testing.assert_close(
                loss.from_logits(logits, other, [1.0]), loss.from_logits(logits, batch, [1.0]), rtol=exactly, atol=1e-6
            )
    sound(again, capsys)


def test_a_sample_comes_back_as_rows_without_a_tail(
    teacher: Path, tokenizer_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = captured(tmp_path / "first", teacher, CHATS, "capture.k=12")
    again = ingest_here(export_here(store, tmp_path / "out"), tmp_path / "again.zarr", tokenizer_only)
    cache = TeacherCache(str(again))
    assert {*cache.attributes["unknown"]} == {"logsumexp", "tail_logprob", "next_logprob"}
    assert cache.arrays == {"tokens", "loss_mask", "target_ids", "target_logprobs"}
    student, found = build_model("qwen3", vocab_size=300), by_example(again)
    loss = DistillationLoss(tail="renormalize")
    for number, sample in enumerate(TeacherCache(str(store))):
        batch, other = collate([sample]), collate([found[number]])
        logits = student(batch["input_ids"]).logits.detach()
        ours, theirs = (loss.from_logits(logits, one, [1.0]) for one in (batch, other))
        torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)  # weights are rounded as log-probabilities are
        rows = {name: values[other["loss_mask"]] for name, values in other.items() if name != "sample"}
        assert measured(logits[other["loss_mask"]], rows, [1.0])[:4].isfinite().all()
    sound(again, capsys)
    assert inspect([str(again)]) == 0
    assert "unknown: logsumexp, tail_logprob, next_logprob" in capsys.readouterr().out


def test_losses_that_need_what_is_unknown_say_so(teacher: Path, tokenizer_only: Path, tmp_path: Path) -> None:
    from distill.config.generate import TeacherConfig
    from distill.teacher.source import locate

    store = captured(tmp_path / "first", teacher, CHATS, "capture.k=12")
    cache = TeacherCache(str(ingest_here(export_here(store, tmp_path / "out"), tmp_path / "x.zarr", tokenizer_only)))
    source, student = locate(TeacherConfig(model=str(teacher))), build_model("qwen3", vocab_size=300)
    check(source, DistillationLoss(tail="renormalize", temperature=2.0), cache)
    for loss, words in (
        (DistillationLoss(), "divergence forward_kl and tail renormalize with"),
        (DistillationLoss(tail="ground_truth"), "found forward_kl and ground_truth"),
        (DistillationLoss("reverse_kl"), "found reverse_kl and bucket"),
        (DistillationLoss("on_policy"), "expected next_logprob in"),
        (DistillationLoss(temperature=2.0), "loss.temperature: expected one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(source, loss, cache)
        if loss.temperature == 1:
            with pytest.raises(ConfigError, match=words):
                Learner(student, loss, cache.temperatures)(collate([cache[0]]))


def test_killed_and_split_among_workers_it_is_the_same_store(
    vllm: list[dict[str, Any]], tokenizer_only: Path, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", vllm)
    whole = ingest_here(rows, tmp_path / "x.zarr", tokenizer_only, "store.block_rows=64")
    expected = tree(whole)
    blocks = sorted(int(file.name) for file in (whole / "commits" / "c").iterdir())
    assert len(blocks) > 3
    (whole / "commits" / "c" / str(blocks[1])).unlink()
    (whole / "target_ids" / "c" / str(blocks[2]) / "0").unlink()
    (whole / "tokens" / "c" / str(blocks[0])).unlink()
    again = ingest_here(rows, tmp_path / "x.zarr", tokenizer_only, "store.block_rows=64")
    assert tree(again) == expected


def test_the_teacher_is_asked_again(
    teacher: Path, vllm: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the same of its own rows, in either form, with and without a tail; and not of rows that are shifted."""
    store = captured(tmp_path / "first", teacher, TEXTS, "capture.method=topk", "capture.k=7")
    out = export_here(store, tmp_path / "out")
    whole = captured(tmp_path / "whole", teacher, CHATS, "capture.method=topk", "capture.k=300")
    for path, name in (
        (write(tmp_path / "rows.jsonl", vllm), "a"), (out, "b"), (export_here(whole, tmp_path / "all"), "c"),
    ):  # fmt: skip
        found = ingest_here(path, tmp_path / f"{name}.zarr", teacher)
        assert verify([str(found), "--teacher", "teacher.device=cpu"]) == 0, capsys.readouterr().out
        assert "the store says what this teacher says" in capsys.readouterr().out
    assert "tail_logprob" in Store.existing(str(found), {}).unknown
    rows: list[dict[str, Any]] = []
    for row in table(out, tmp_path).to_list():
        moved = {name: [row[name][-1], *row[name][:-1]] for name in ("target_token_ids", "target_logprobs")}
        rows.append({**row, **moved})
    found = ingest_here(write(tmp_path / "wrong.jsonl", rows), tmp_path / "wrong.zarr", teacher)
    assert verify([str(found), "--teacher", "teacher.device=cpu"]) == 1
    assert "THE STORE IS NOT WHAT THIS TEACHER SAYS" in capsys.readouterr().out


def test_rows_scaled_to_1_do_not_say_how_likely_the_next_token_is(
    vllm: list[dict[str, Any]], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each names the next token, but its log-probability is higher than the teacher's: unknown, and so not stored."""
    rows = []
    for row in vllm:
        scaled: list[Any] = [None]
        for entries in row["prompt_logprobs"][1:]:
            whole = math.log(sum(math.exp(one["logprob"]) for one in entries.values()))
            scaled.append({i: {**one, "logprob": one["logprob"] - whole} for i, one in entries.items()})
        rows.append({**row, "prompt_logprobs": scaled})
    store = ingest_here(write(tmp_path / "rows.jsonl", rows), tmp_path / "x.zarr", teacher)
    found = Store.existing(str(store), {})
    assert {*found.unknown} == {"logsumexp", "tail_logprob", "next_logprob"}
    assert np.isnan(found.read_all("next_logprob")).all()
    with pytest.raises(ConfigError, match="expected next_logprob in"):
        DistillationLoss("on_policy").check_arrays(TeacherCache(str(store)).arrays, str(store))
    assert verify([str(store), "--teacher", "teacher.device=cpu"]) == 0, capsys.readouterr().out


def change(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


def at(row: dict[str, Any], token: int, **entries: Any) -> dict[str, Any]:
    """A row of prompt_logprobs where the entries of one token are changed, by id."""
    said = list(row["prompt_logprobs"])
    said[token] = {**(said[token] or {}), **{key.strip("_"): {"logprob": value} for key, value in entries.items()}}
    return change(row, prompt_logprobs=said)


def shifted(row: dict[str, Any]) -> dict[str, Any]:
    return change(row, prompt_logprobs=[None, *row["prompt_logprobs"][2:], row["prompt_logprobs"][1]])


BAD_VLLM: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda row: at(row, 2, _400=-9.0), "token ids below 300, the teacher's vocabulary, at position 2 of example 4"),
    (lambda row: at(row, 3, _299=0.5), "expected log-probabilities, at most 0 at position 3 of example 4"),
    (lambda row: at(row, 3, _299=-math.inf), "log-probabilities, at most 0 at position 3 of example 4.* found -inf"),
    (lambda row: at(row, 3, _299=math.nan), "log-probabilities, at most 0 at position 3 of example 4.* found nan"),
    (lambda row: at(row, 3, _299=-0.01, _298=-0.01), "probabilities that add up to at most 1 at position 3 of exam"),
    (lambda row: at(row, 3, x=-3.0), r"expected a token id in 'prompt_logprobs' at token 3 of example 4.* found 'x'"),
    (lambda row: at(row, 3, _299=None), r"expected a log-probability in 'prompt_logprobs' at token 3 of example 4"),
    (lambda row: at(row, 0, _5=-3.0), "expected null in 'prompt_logprobs' at the first token of example 4"),
    (shifted, r"expected the token itself \(id \d+\) in 'prompt_logprobs' at token 1 of example 4.*shifted by one"),
    (lambda row: change(row, prompt_logprobs=row["prompt_logprobs"][1:]), "expected 34 entries in 'prompt_logprobs'"),
    (lambda row: change(row, prompt_logprobs=None), "entries in 'prompt_logprobs' of example 4.*found None"),
    (lambda row: change(row, prompt_token_ids=[1, 2, 300, *row["prompt_token_ids"][3:]]), "token ids below 300.* 300"),
    (lambda row: change(row, prompt_token_ids=[10**30, *row["prompt_token_ids"][1:]]), "token ids below 300.* 10000"),
    (lambda row: at(row, 3, **{"_1" + "0" * 5000: -9.0}), "expected a token id in 'prompt_logprobs' at token 3 of"),
    (lambda row: at(row, 3, _299=-(10**400)), "expected a log-probability in 'prompt_logprobs' at token 3 of exam"),
    (lambda row: change(row, labels=["a\nb"] * 34), "expected labels that are the tokens or -100.* of example 4"),
    (lambda row: change(row, prompt_token_ids="abc"), "expected a list of token ids in 'prompt_token_ids' of ex"),
    (lambda row: change(row, labels=[1] * 34), "expected labels that are the tokens or -100.* of example 4"),
    (
        lambda row: change(row, prompt_logprobs=[*row["prompt_logprobs"][:5], None, *row["prompt_logprobs"][6:]]),
        r"expected the token itself \(id \d+\) in 'prompt_logprobs' at token 5 of example 4.* found nothing",
    ),
    (
        lambda row: change(row, prompt_logprobs=[None, *([[5, -1.0], [5, -2.0], [t, -3.0]] for t in [9] * 33)],
                           prompt_token_ids=[9] * 34),
        "expected different ids at position 1 of example 4.* found 5 twice",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), BAD_VLLM)
def test_wrong_prompt_logprobs_are_refused_in_a_line(
    spoil: Callable[[Any], Any], words: str, vllm: list[dict[str, Any]], tokenizer_only: Path, tmp_path: Path
) -> None:
    rows = [spoil(row) if number == 4 else row for number, row in enumerate(vllm)]
    with pytest.raises(DataError, match=words) as error:
        ingest_here(write(tmp_path / "rows.jsonl", rows), tmp_path / "x.zarr", tokenizer_only)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.zarr").exists()


def test_wrong_targets_are_refused_in_a_line(teacher: Path, tokenizer_only: Path, tmp_path: Path) -> None:
    store = captured(tmp_path / "first", teacher, CHATS, "capture.method=topk", "capture.k=7")
    rows = table(export_here(store, tmp_path / "out"), tmp_path).to_list()
    other = table(export_here(store, tmp_path / "moved", "align=token"), tmp_path).to_list()

    def refused(words: str, found: list[Any], *arguments: str) -> None:
        with pytest.raises(DataError, match=words) as error:
            path = write(tmp_path / "rows.jsonl", found)
            ingest_here(path, tmp_path / "x.zarr", tokenizer_only, *arguments)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "x.zarr").exists()

    third = rows[3]
    length, trained = len(third["labels"]), [i for i, label in enumerate(third["labels"]) if label != -100]
    for spoiled, words in (
        (
            other[3],
            "expected targets about the token of the next position, as in the rows before, found others in exam",
        ),
        ({**third, "labels": third["labels"][1:]}, f"expected {length} entries in 'labels' of example 3"),
        ({**third, "target_logprobs": third["target_logprobs"][1:]}, f"{length} entries in 'target_logprobs' of exam"),
        ({**third, "target_mask": [row[:-1] for row in third["target_mask"]]}, "as many entries in 'target_mask' as"),
        *(
            ({**third, name: [spoiled, *third[name][1:]]}, f"expected numbers in '{name}' of example 3")
            for name in ("target_token_ids", "target_logprobs", "target_mask")
            for spoiled in ([[3]] * 7, [*third[name][0][:-1], [3]])
        ),
        ({**third, "target_token_ids": [[[7]] * 7] * length}, "expected numbers in 'target_token_ids' of example 3"),
        ({**third, "target_token_ids": [[7] * 7] * length}, "expected different ids at position"),
        (
            {**third, "target_mask": [*third["target_mask"][:-2], [0] * 7, [0] * 7]},
            f"expected log-probabilities about token {length - 1} of example 3",
        ),
    ):
        assert trained
        refused(words, [*rows[:3], spoiled, *rows[4:]])
    bare = [{name: row[name] for name in ("input_ids", "target_token_ids", "target_logprobs")} for row in rows]
    refused("expected columns input_ids, target_token_ids and target_logprobs, or", [{"text": "a"}])
    padded = [{**row, "target_logprobs": [[-1e9] * 7, *row["target_logprobs"][1:-1], [-1e9] * 7]} for row in bare]
    refused("dataset.align: expected logits or token with .* found auto", padded)
    with pytest.raises(TeacherError, match="expected a Hugging Face id or a model's folder, found no folder"):
        ingest_here(tmp_path / "rows.jsonl", tmp_path / "x.zarr", tmp_path / "no-model")


def test_targets_without_a_mask(teacher: Path, tokenizer_only: Path, tmp_path: Path) -> None:
    """Padding of -inf and -1e9 says which rows there are; lists may have different lengths, and null rows."""
    store = captured(tmp_path / "first", teacher, TEXTS, "capture.method=topk", "capture.k=7")
    expected = by_example(ingest_here(export_here(store, tmp_path / "out"), tmp_path / "a.zarr", tokenizer_only))
    rows = []
    for number, row in enumerate(table(tmp_path / "out", tmp_path)):
        ids, logprobs = row["target_token_ids"], row["target_logprobs"]
        end = [(None, None), ([0] * 7, [-math.inf] * 7), ([0] * 7, [-1e9] * 7), ([], [])][number % 4]
        rows.append(
            {"input_ids": row["input_ids"], "target_token_ids": [*ids[:-1], end[0]],
             "target_logprobs": [*logprobs[:-1], end[1]]}
        )  # fmt: skip
    found = by_example(ingest_here(write(tmp_path / "b.jsonl", rows), tmp_path / "b.zarr", tokenizer_only))
    for number, sample in expected.items():
        assert "loss_mask" not in found[number]
        for name in found[number].keys() - {"sample"}:
            assert np.array_equal(found[number][name], sample[name], equal_nan=True)


def test_full_rows_of_logits(
    logprobs: tuple[list[list[int]], list[torch.Tensor]], tokenizer_only: Path, tmp_path: Path
) -> None:
    """A row for each of T logits: with align=logits the last is left out; nothing else takes such rows."""
    rows: list[dict[str, Any]] = []
    for ids, said in zip(*logprobs, strict=True):
        top = said.topk(K)
        rows.append(
            {"input_ids": ids, "target_token_ids": top.indices.tolist(), "target_logprobs": top.values.tolist()}
        )
    one = {name: values[:1] for name, values in rows[0].items()}  # too short to tell anything
    full = write(tmp_path / "full.jsonl", [one, *rows])
    masked = [{**row, "target_mask": [[1] * K] * len(row["input_ids"])} for row in rows]
    empty = [
        {**row, "target_token_ids": [*row["target_token_ids"][:-1], []],
         "target_logprobs": [*row["target_logprobs"][:-1], []]}
        for row in rows
    ]  # fmt: skip
    expected = by_example(
        ingest_here(write(tmp_path / "empty.jsonl", [one, *empty]), tmp_path / "a.zarr", tokenizer_only)
    )
    assert len(expected) == 9
    for name, path, first in (("b", full, 1), ("c", write(tmp_path / "masked.jsonl", masked), 0)):
        store = ingest_here(path, tmp_path / f"{name}.zarr", tokenizer_only, "dataset.align=logits")
        found = by_example(store)
        for number, sample in enumerate(expected.values()):
            other = found[[*expected][number] - 1 + first]
            assert other["target_ids"][-1].tolist() == [-1] * K
            for array in sample.keys() - {"sample"}:
                assert np.array_equal(other[array], sample[array], equal_nan=True)
    later = write(tmp_path / "later.jsonl", [empty[0], rows[1]])
    token = [{**row, "target_token_ids": [[], *row["target_token_ids"][1:]],
              "target_logprobs": [[], *row["target_logprobs"][1:]]} for row in rows]  # fmt: skip
    for path, align, words in (
        (full, "auto", "expected logits or token with example 1 .* the first row and the last both have entries"),
        (full, "token", "expected an empty first row in example 1 .* with token.* dataset.align=logits"),
        (later, "auto", "about the token of the next position, as in the rows before, found others in example 1"),
        (
            write(tmp_path / "token.jsonl", token),
            "logits",
            "of the next position, as logits says, found others in example 0",
        ),
    ):
        with pytest.raises(DataError, match=words) as error:
            ingest_here(path, tmp_path / "x.zarr", tokenizer_only, f"dataset.align={align}")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "x.zarr").exists()


def test_rows_that_look_shifted_are_told(
    vllm: list[dict[str, Any]], tokenizer_only: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher that mostly expects the token that follows, beside a mask of the other alignment."""

    def told(align: str) -> bool:
        rows = []
        for row in vllm:
            ids = row["prompt_token_ids"]
            said = [[i, (i + 1) % 300] for i in [*ids[1:], 0]]
            mask = [[1, 1]] * (len(ids) - 1)
            mask = [*mask, [0, 0]] if align == "logits" else [[0, 0], *mask]
            rows.append({"input_ids": ids, "target_token_ids": said, "target_mask": mask})
            rows[-1]["target_logprobs"] = [[-0.1, -5.0]] * len(ids)
        caplog.clear()
        path = write(tmp_path / f"{align}.jsonl", rows)
        store = ingest_here(path, tmp_path / f"{align}.zarr", tokenizer_only)
        assert Store.existing(str(store), {}).attributes["captured"]["align"] == align
        return "check dataset.align, found" in caplog.text

    assert not told("logits")
    assert told("token")
