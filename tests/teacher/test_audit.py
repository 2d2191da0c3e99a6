"""A store agrees with the teacher that made it, to within rounding and batch shapes, and with nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import verify
from distill.errors import StoreError, TeacherError
from distill.store.schema import CAPTURED
from distill.store.store import Store
from distill.store.writable import WritableStore
from distill.teacher.audit import FACTOR, Audit, Figures, audit, report
from tests.support import build_model, generate_here, make_tokenizer, reseal


@pytest.fixture(scope="module", params=["float32", "bfloat16", "sampled"])
def made(
    request: pytest.FixtureRequest, texts: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a model and its store of several blocks, of this dtype; or of samples, in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    save(build_model("llama"), folder / "model")
    dtype = request.param.replace("sampled", "bfloat16")
    arguments = [f"teacher.model={folder / 'model'}", f"teacher.dtype={dtype}", "batch.max_tokens=512"]
    arguments += [f"dataset.path={texts(40)}", "dataset.max_length=96", "capture.k=8", "store.block_rows=512"]
    if request.param != "sampled":
        arguments += ["capture.method=topk", "capture.temperatures=[2.0,1.0]"]
    generate_here(folder, *arguments, f"store.path={folder / 'x.zarr'}")
    return folder


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def changed(made: Path, folder: Path, change: Callable[[dict[str, Any], Store], None]) -> Store:
    """A copy of the store whose captured rows, [R, ...] each, are changed, and committed as if they were right."""
    shutil.copytree(made / "x.zarr", folder)
    old, new = Store.existing(str(made / "x.zarr"), {}), WritableStore.existing(str(folder), {})
    rows = {name: old.read_all(name) for name in CAPTURED}
    change(rows, old)
    for block, tokens in enumerate(old.tokens_per_block()):
        for name in CAPTURED:
            new.write_rows(name, block, rows[name][block * old.block_rows : (block + 1) * old.block_rows])
        new.commit(block, int(tokens))
    return Store.existing(str(folder), {})


def test_an_honest_store_agrees(made: Path) -> None:
    store = Store.existing(str(made / "x.zarr"), {})
    for seed in range(2):
        found = audit(store, num_samples=8, seed=seed)
        assert found.ok, report(found)
        assert found.other == []
        assert found.samples >= 8
        assert found.blocks >= 4
        assert 1e-6 < found.store.mean < 2e-3, report(found)  # rounding is seen
        assert found.store.mean < 1.5 * found.shapes.mean, report(found)
    again = audit(store, num_samples=8, seed=1)
    assert again == found
    assert audit(store, num_samples=1, seed=3).rows != found.rows
    everything = audit(store, num_samples=10**9)
    assert (everything.samples, everything.rows) == (store.num_samples, store.attributes["num_tokens"])
    assert everything.blocks == store.num_blocks
    assert everything.ok


def shift(rows: dict[str, Any], store: Store) -> None:
    for name in CAPTURED:
        rows[name][1:] = rows[name][:-1].copy()
    fill(rows, store)


def shift_soundly(rows: dict[str, Any], store: Store) -> None:
    """The same, and next_logprob is what such rows would have, so that nothing is wrong with them in themselves."""
    shift(rows, store)
    logprobs = np.nan_to_num(rows["target_logprobs"].astype(np.float32), nan=-np.inf)
    kept = (rows["target_ids"] == np.append(store.read_all("tokens")[1:], -1)[:, None]) & np.isfinite(logprobs)
    tail = rows["tail_logprob"][:, store.attributes["temperatures"].index(1.0)]
    following = np.where(kept.any(axis=1), np.where(kept, logprobs, 0).sum(axis=1), tail - 1)
    following[store.read_all("sample_start") + store.read_all("sample_length") - 1] = np.nan
    rows["next_logprob"][:] = following


def other_following(rows: dict[str, Any], store: Store) -> None:
    rows["next_logprob"][::50] -= np.float16(1)


def permute(rows: dict[str, Any], store: Store) -> None:
    """Two samples of each block have each other's rows."""
    starts, lengths = store.read_all("sample_start"), store.read_all("sample_length")
    for block in range(store.num_blocks):
        here = [i for i in store.samples_of(block) if lengths[i] > 3]
        one, other = here[0], here[-1]
        n = min(lengths[one], lengths[other])
        at = np.r_[starts[one] : starts[one] + n, starts[other] : starts[other] + n]
        for name in CAPTURED:
            rows[name][at] = rows[name][np.roll(at, n)]


def other_temperature(rows: dict[str, Any], store: Store) -> None:
    rows["logsumexp"][:] = rows["logsumexp"][:, ::-1]


def other_tail(rows: dict[str, Any], store: Store) -> None:
    rows["tail_logprob"][:] = rows["tail_logprob"][:, ::-1]


def swapped_ids(rows: dict[str, Any], store: Store) -> None:
    rows["target_ids"][:, [0, 1]] = rows["target_ids"][:, [1, 0]]


def other_ids(rows: dict[str, Any], store: Store) -> None:
    used = rows["target_ids"][:, 0] >= 0
    rows["target_ids"][used, -1] = (rows["target_ids"][used].max(axis=1) + 1) % 1000


def other_draws(rows: dict[str, Any], store: Store) -> None:
    """Of every tenth row one drawn id is the next one."""
    drawn = np.isnan(rows["target_logprobs"]) & (rows["target_ids"] >= 0)
    some = np.flatnonzero(drawn.any(axis=1))[::10]
    rows["target_ids"][some, drawn[some].argmax(axis=1)] += 1


def missing(rows: dict[str, Any], store: Store) -> None:
    rows["target_logprobs"][::50] = np.nan


def fill(rows: dict[str, Any], store: Store) -> None:
    """No row in use has fill values."""
    empty = np.flatnonzero(rows["target_ids"][:, 0] < 0)
    for name in CAPTURED:
        rows[name][empty] = rows[name][5]


def test_other_rows_do_not(made: Path, tmp_path: Path) -> None:
    changes = [shift, permute, other_ids, other_following]
    if made.name.startswith("float32"):
        changes += [other_temperature, other_tail, swapped_ids, missing]
    if made.name.startswith("sampled"):
        changes += [swapped_ids, missing, other_draws]
    for change in changes:
        found = audit(changed(made, tmp_path / f"{change.__name__}.zarr", change), num_samples=10)
        assert not found.ok, f"{change.__name__}\n{report(found)}"
        assert "NOT" in report(found)


def test_what_a_store_does_not_know_is_not_compared(made: Path, tmp_path: Path) -> None:
    """The token that follows, where its log-probability may have been scaled with its row."""
    if made.name.startswith("sampled"):
        return  # nobody else captures such rows
    store = changed(made, tmp_path / "x.zarr", other_following)
    for unknown, ok in (["logsumexp"], False), (["logsumexp", "next_logprob"], True):
        reseal(tmp_path / "x.zarr", unknown=unknown)
        found = audit(Store.existing(store.path, {}), num_samples=10)
        assert found.ok == ok, report(found)


def test_other_weights_do_not(made: Path, tmp_path: Path) -> None:
    store = Store.existing(str(made / "x.zarr"), {})
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    found = audit(store, model=str(save(model, tmp_path / "nudged")), num_samples=8)
    assert found.other == ["teacher.weights"]
    assert not found.ok, report(found)
    assert "teacher.weights differ" in report(found)
    # The same weights in another file: it says so, and the rows agree.
    build_model("llama").save_pretrained(tmp_path / "same", max_shard_size="100KB")
    make_tokenizer().save_pretrained(tmp_path / "same")
    found = audit(store, model=str(tmp_path / "same"), num_samples=8)
    assert found.other == ["teacher.weights"]
    assert found.ok, report(found)


def test_what_cannot_be_loaded_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.existing(str(made / "x.zarr"), {})
    save(build_model("llama", vocab_size=999), tmp_path / "other")
    for model, message in (
        (str(tmp_path / "nowhere" / "x"), "found no folder"),
        (str(tmp_path / "other"), "expected a vocabulary of 1,000 as the store has, found 999"),
    ):
        with pytest.raises(TeacherError, match=message) as refused:
            audit(store, model=model)
        assert "\n" not in str(refused.value)
    if not torch.cuda.is_available():
        with pytest.raises(TeacherError, match=r"teacher.device: expected a CUDA GPU"):
            audit(store, device="cuda")
    monkeypatch.setattr("distill.teacher.loading.free_bytes", lambda device, workers: 1000)
    with pytest.raises(TeacherError, match=r"teacher.model does not fit"):
        audit(store)


def test_a_store_without_a_block_has_nothing_to_compare(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "x.zarr", tmp_path / "x.zarr")
    shutil.rmtree(tmp_path / "x.zarr" / "commits" / "c")
    with pytest.raises(StoreError, match="expected a committed block"):
        audit(Store.existing(str(tmp_path / "x.zarr"), {}))


def test_the_verdict_follows_from_the_figures() -> None:
    shapes = Figures(1e-4, 1e-3, 1e-2, 0.001, 0.0, 1e-5, 1e-3)
    for store, ok in (
        (shapes, True),
        (Figures(2.9e-4, 2.9e-3, 99.0, 0.01, 0.009, 0.01, 1e-3), True),
        (Figures(3.2e-4, 1e-3, 1e-2, 0.001, 0.0, 1e-5, 1e-3), False),
        (Figures(1e-4, 3.2e-3, 1e-2, 0.001, 0.0, 1e-5, 1e-3), False),
        (Figures(1e-4, 1e-3, 1e-2, 0.02, 0.0, 1e-5, 1e-3), False),
        (Figures(1e-4, 1e-3, 1e-2, 0.001, 0.011, 1e-5, 1e-3), False),
        (Figures(1e-4, 1e-3, 1e-2, 0.001, 0.0, 0.02, 1e-3), False),
        (Figures(1e-4, 1e-3, 1e-2, 0.001, 0.0, 1e-5, 0.02), False),
        (Figures(np.nan, 1e-3, 1e-2, 0.001, 0.0, 1e-5, 1e-3), False),
        (Figures(1e-4, 1e-3, np.nan, 0.001, 0.0, 1e-5, 1e-3), False),
    ):
        found = Audit("m", [], 1, 2, 3, store, shapes)
        assert found.ok == ok
        assert re.search("beyond the limit: " if not ok else f"at most {FACTOR:g} times", report(found))
    assert json.dumps(report(found))


def test_verify_asks_the_teacher(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(made / "x.zarr"), "--teacher", "teacher.device=cpu"]) == 0
    assert "the store says what this teacher says" in capsys.readouterr().out
    moved = shutil.move(made / "model", tmp_path / "moved")
    try:
        assert verify.main([str(made / "x.zarr"), "--teacher"]) == 2
        assert "error: teacher.model: expected a Hugging Face id or a model's folder" in capsys.readouterr().err
        assert verify.main([str(made / "x.zarr"), "--teacher", f"teacher.model={moved}"]) == 0
        assert "the files of the store" in capsys.readouterr().out
    finally:
        shutil.move(moved, made / "model")
    changed(made, tmp_path / "shifted.zarr", shift_soundly)
    assert verify.main([str(tmp_path / "shifted.zarr"), "--teacher"]) == 1
    assert "THE STORE IS NOT WHAT THIS TEACHER SAYS: beyond the limit: mean" in capsys.readouterr().out
