"""The code of docs/interchange.md runs as it is written, and its loss is ours."""

import re
from pathlib import Path
from typing import Any

import pytest

from distill.reading.cache import TeacherCache
from distill.reading.samples import collate
from distill.student.loss import DistillationLoss
from tests.exchange.support import CHATS, captured, export_here
from tests.support import save_model

PAGE = (Path(__file__).parent.parent.parent / "docs" / "interchange.md").read_text()


@pytest.mark.parametrize("method", [["capture.method=topk", "capture.k=7"], ["capture.k=12"]], ids=["topk", "sample"])
def test_plain_pytorch(method: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_model("llama", tmp_path / "teacher", chat=True, vocab_size=300)
    save_model("qwen3", tmp_path / "student", vocab_size=300)
    store = captured(tmp_path / "store", teacher, CHATS, *method)
    export_here(store, tmp_path / "outputs" / "export")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (code,) = re.findall(r"^```python\n(import datasets.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = collate([TeacherCache(str(store))[1]])
    assert batch["input_ids"][0].tolist() == names["row"]["input_ids"].tolist()
    total = DistillationLoss(tail="renormalize").from_logits(names["student"](batch["input_ids"]).logits, batch, [1.0])
    assert names["loss"].item() == pytest.approx(total.item() / int(batch["loss_mask"].sum()), rel=1e-5)
    assert names["loss"].item() > 0.1
