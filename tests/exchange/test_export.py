"""What is exported: the values of the store, and the loss of the store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.config.exchange import ExportConfig
from distill.errors import ConfigError, StoreError
from distill.reading.cache import TeacherCache
from distill.reading.samples import collate
from distill.settings import load, named
from distill.store.writable import WritableStore
from distill.student.loss import DistillationLoss
from tests.exchange.support import CHATS, TEXTS, captured, export_here, kl_of_columns, table
from tests.support import build_model, save_model, tree


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "teacher", chat=True, vocab_size=300)


KINDS: dict[str, tuple[Any, list[str]]] = {
    "topk": (TEXTS, ["capture.method=topk", "capture.k=7"]),
    "topk of chats": (CHATS, ["capture.method=topk", "capture.k=7"]),
    "sample of chats": (CHATS, ["capture.k=12"]),
}


@pytest.fixture(scope="module")
def stores(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: captured(tmp_path_factory.mktemp("store"), teacher, rows, *arguments)
        for name, (rows, arguments) in KINDS.items()
    }


@pytest.fixture(scope="module")
def student() -> Any:
    return build_model("qwen3", vocab_size=300)


@pytest.mark.parametrize("align", ["logits", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_columns_is_that_of_the_store(
    stores: dict[str, Path], student: Any, kind: str, align: str, tmp_path: Path
) -> None:
    cache = TeacherCache(str(stores[kind]))
    rows = table(export_here(stores[kind], tmp_path / "out", f"align={align}", "part_tokens=100"), tmp_path)
    assert len(list((tmp_path / "out").glob("part_*.parquet"))) > 1
    assert len(rows) == len(cache)
    loss = DistillationLoss(tail="renormalize")
    for sample, row in zip(cache, rows, strict=True):
        batch = collate([sample])
        assert row["input_ids"] == sample["tokens"].tolist()
        assert row["attention_mask"] == [1] * len(sample["tokens"])
        trained = [False, *batch["loss_mask"][0, :-1].tolist()]  # of the token itself
        assert row["labels"] == [token if one else -100 for token, one in zip(row["input_ids"], trained, strict=True)]
        with torch.no_grad():
            logits = student(input_ids=batch["input_ids"]).logits
        ours = loss.from_logits(logits.double(), batch, cache.temperatures)
        theirs = kl_of_columns(logits[0], row, align)
        assert float(ours) > 0.1
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_the_stores(stores: dict[str, Path], kind: str, tmp_path: Path) -> None:
    cache = TeacherCache(str(stores[kind]))
    moved = table(export_here(stores[kind], tmp_path / "moved", "align=token"), tmp_path)
    rows = table(export_here(stores[kind], tmp_path / "out"), tmp_path)
    for sample, row, other in zip(cache, rows, moved, strict=True):
        ids, logprobs, mask = (np.array(row[f"target_{name}"]) for name in ("token_ids", "logprobs", "mask"))
        kept = (~sample["target_logprobs"].isnan()).numpy()
        assert (ids[kept] == sample["target_ids"].numpy()[kept]).all()
        assert (logprobs[kept].astype("f2") == sample["target_logprobs"].numpy()[kept].astype("f2")).all()
        drawn = (sample["target_ids"] >= 0).numpy() & ~kept
        assert drawn.any() == (kind == "sample of chats")
        weight = np.exp(np.where(kept | drawn, logprobs, -np.inf)).sum(axis=1)
        if drawn.any():
            assert (ids[drawn] == sample["target_ids"].numpy()[drawn]).all()
            np.testing.assert_allclose(weight, 1, atol=0.02)
        nothing = ~kept & ~drawn
        assert (ids[nothing] == 0).all()
        assert (logprobs[nothing] == np.float32(-1e9)).all()
        trained = collate([sample])["loss_mask"][0].numpy()
        assert (mask == ((kept | drawn) & trained[:, None])).all()
        for name, first in (("token_ids", 0), ("logprobs", -1e9), ("mask", 0)):
            assert other[f"target_{name}"] == [[first] * ids.shape[1], *row[f"target_{name}"][:-1]]


def test_axolotls_formula_as_it_is_weighs_each_row_by_its_kept_mass(
    stores: dict[str, Path], student: Any, tmp_path: Path
) -> None:
    """Without scaling the kept ids to 1, as its kernel takes them: the gradient of row t is S_t times ours."""
    cache = TeacherCache(str(stores["topk"]))
    row, batch = table(export_here(stores["topk"], tmp_path / "out"), tmp_path)[3], collate([cache[3]])
    logits = student(input_ids=batch["input_ids"]).logits.detach().requires_grad_()
    (theirs,) = torch.autograd.grad(kl_of_columns(logits[0], row, "logits", renormalize=False), logits)
    (ours,) = torch.autograd.grad(
        DistillationLoss(tail="renormalize").from_logits(logits, batch, cache.temperatures), logits
    )
    mass = cache[3]["target_logprobs"].exp().sum(dim=1)
    assert float(mass.max()) < 0.5
    torch.testing.assert_close(theirs[0], ours[0] * mass[:, None], atol=1e-6, rtol=1e-4)


def test_one_file_is_a_dataset_too_and_files_do_not_depend_on_kills(stores: dict[str, Path], tmp_path: Path) -> None:
    out = export_here(stores["topk"], tmp_path / "out", "part_tokens=60")
    whole = tree(out)
    files = sorted(out.glob("part_*.parquet"))
    assert len(files) > 4
    kept = files[1].stat().st_mtime_ns
    files[0].unlink()
    files[2].unlink()
    (out / "part_000003.parquet.partial").write_bytes(b"PAR1")
    export_here(stores["topk"], out, "part_tokens=60")
    assert tree(out) == whole
    assert files[1].stat().st_mtime_ns == kept
    alone = table(export_here(stores["topk"], tmp_path / "alone"), tmp_path)
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [
        "README.md", "export.json", "part_000000.parquet",
    ]  # fmt: skip
    assert alone.to_list() == table(out, tmp_path).to_list()


def test_what_is_not_this_runs_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    out = export_here(stores["topk"], tmp_path / "out")
    before = tree(out)
    with pytest.raises(
        ConfigError, match=r"has another run's export; choose another folder, or delete it:\n  store.di"
    ):
        export_here(stores["topk of chats"], out)
    with pytest.raises(ConfigError, match="align: the folder has 'logits', this run 'token'"):
        export_here(stores["topk"], out, "align=token")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=f"expected a new or empty folder.* found other files in {tmp_path / 'mine'}"):
        export_here(stores["topk"], tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    with pytest.raises(StoreError, match="found no store at"):
        export_here(tmp_path / "none", tmp_path / "other")
    assert tree(out) == before


def test_an_output_that_is_a_store_or_in_one_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    store = stores["topk"]
    before = tree(store)
    (tmp_path / "link").symlink_to(store)
    for out in (store, store / "ex", store / "a" / "b", tmp_path / "link" / "ex"):
        with pytest.raises(ConfigError, match=rf"output: expected a folder outside of stores.* the store {store}"):
            export_here(store, out, f"log_dir={tmp_path}")
    assert tree(store) == before
    assert not (store / "ex").exists()
    assert not (store / "a").exists()


def test_an_unfinished_store_is_refused(stores: dict[str, Path], teacher: Path, tmp_path: Path) -> None:
    store = captured(tmp_path / "x", teacher, TEXTS, "capture.method=topk", "capture.k=3")
    (store / "commits" / "c" / "1").unlink()
    WritableStore.existing(str(store), {}).reopen()
    with pytest.raises(StoreError, match=r"store.path: expected a complete store, found \d of \d blocks in"):
        export_here(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_under_a_name_like_a_key_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is a key, or has a dot before the =, as keys of sections have."""
    monkeypatch.chdir(tmp_path)
    for name in ("k=8.zarr", "align=token", "store.options.a=b"):
        (tmp_path / name).mkdir()
    arguments = named(ExportConfig, ["k=8.zarr", "out", "align=token", "store.options.a=b"], "store.path", "output")
    config = load(ExportConfig, arguments)
    assert (config.store.path, config.output, config.align) == ("k=8.zarr", "out", "token")
    assert config.store.options == {"a": "b"}
    with pytest.raises(ConfigError, match="unknown key j"):
        load(ExportConfig, named(ExportConfig, ["j=8.zarr"], "store.path", "output"))


def test_arguments_without_a_key() -> None:
    alone = ["https://host/x.zarr?a=b", "out", "part_tokens=5", "store.options.region=eu", "mine.yaml"]
    expected = ["part_tokens=5", "store.options.region=eu", "mine.yaml", f"store.path={alone[0]}", "output=out"]
    assert named(ExportConfig, alone, "store.path", "output") == expected
    for wrong, words in (
        (["a", "b", "c"], "at most 2 arguments without a key.*found a b c"),
        (["--all"], "option --all"),
    ):
        with pytest.raises(ConfigError, match=words):
            named(ExportConfig, wrong, "store.path", "output")
