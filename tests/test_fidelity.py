"""The study of docs/fidelity.md on a small random model: its figures are what it says they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numcodecs.pcodec import PCodec
from torch import nn

from distill.store.writable import WritableStore
from distill.student.evaluate import measured, summarize
from tests.benchmarks import fidelity
from tests.benchmarks.fidelity_bytes import ARRAYS, draw_arrays, store_bytes
from tests.benchmarks.fidelity_gradients import angle, compared, gradient
from tests.benchmarks.fidelity_models import Windows, split
from tests.benchmarks.fidelity_rows import METHODS, Method, Settings, as_read, expected_ids, rows_of
from tests.benchmarks.fidelity_students import STUDENTS, Seed, evaluate
from tests.benchmarks.fidelity_tables import tables
from tests.support import build_model

N, V = 6, 300
UNBIASED = [Method("draws", 50), Method("varopt", 8), Method("varopt", 24)]


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a teacher and a student, [N, V]; and the tokens that follow."""
    torch.manual_seed(0)
    return torch.randn(N, V) * 3, torch.randn(N, V) * 2, torch.randint(V, (N,))


def test_the_gradient_of_the_whole_distribution_is_q_less_p() -> None:
    p, q, following = logits()
    found = gradient(Method("full"), q, p, following, 0, 0)
    assert torch.allclose(found, q.softmax(dim=1) - p.softmax(dim=1), atol=1e-6)
    text = gradient(Method("text"), q, p, following, 0, 0)
    assert torch.allclose(text, q.softmax(dim=1) - nn.functional.one_hot(following, V), atol=1e-6)


@pytest.mark.parametrize("method", [*UNBIASED, Method("topk", 16, "renormalize"), Method("topk", 16)])
def test_the_mean_gradient_over_draws_converges_to_the_whole_one_where_it_is_unbiased(method: Method) -> None:
    p, q, following = logits()
    whole, seeds = gradient(Method("full"), q, p, following, 0, 0), 400
    mean, error = torch.zeros(N, V), 0.0
    for seed in range(seeds):
        each = gradient(method, q, p, following, seed, 0)
        error += float((each - whole).square().sum()) / seeds
        mean += each / seeds
    left = float((mean - whole).square().sum()) / error
    if method in UNBIASED:
        assert 0.5 / seeds < left < 2 / seeds
    else:
        assert left == pytest.approx(1, rel=1e-3)


def test_error_and_angle_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    said, saying, following = torch.randn(600, 16), torch.randn(600, 16), torch.randint(V, (600,))
    teacher, student = nn.Linear(16, V), nn.Linear(16, V)
    ways = [(Method("full"), 0), (Method("text"), 0)]
    nothing, found = compared(ways, teacher, said, student, saying, following).values()
    assert nothing["error"] == 0
    assert nothing["degrees"] < 1e-6
    with torch.no_grad():
        p, q = teacher(said).softmax(dim=1).double(), student(saying).softmax(dim=1).double()
    ours, whole = q - nn.functional.one_hot(following, V), q - p
    assert found["error"] == pytest.approx(float((ours - whole).square().sum() / whole.square().sum()), rel=1e-4)
    cosine = nn.functional.cosine_similarity(ours.mean(dim=0), whole.mean(dim=0), dim=0)
    assert found["degrees"] == pytest.approx(float(torch.rad2deg(torch.acos(cosine))), rel=1e-3)
    assert angle(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(45)


def test_draws_are_written_without_loss_and_ids_are_counted() -> None:
    p, _, following = logits()
    rows = rows_of(p, Method("draws", 50), following, 0, 0)
    ids, counts, lengths = (PCodec().decode(PCodec().encode(values)) for values in draw_arrays(rows["target_ids"]))
    assert np.array_equal(np.repeat(ids, counts).reshape(N, 50), rows["target_ids"])
    assert lengths.sum() == len(ids) == sum(len(set(row)) for row in rows["target_ids"].tolist())
    assert expected_ids(rows) == lengths.mean()
    sampled = rows_of(p, Method("varopt", 24), following, 0, 0)["target_ids"]
    assert expected_ids({"target_ids": sampled}) == np.mean([sum(row >= 0) for row in sampled])


def test_bytes_are_those_of_the_files_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher, tokens = torch.randn(512, V) * 3, torch.randint(V, (512,))
    sizes: list[int] = []

    plain = WritableStore.mark_complete

    def watched(store: WritableStore) -> None:
        plain(store)
        folders = [Path(store.path) / name / "c" for name in ARRAYS]
        sizes.append(sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()))

    monkeypatch.setattr(WritableStore, "mark_complete", watched)
    for method in (Method("topk", 16), Method("varopt", 16)):
        rows = rows_of(teacher, method, tokens, 0, 0)
        assert store_bytes(tokens.numpy().astype(np.int32), rows, method, 64) == sizes[-1] > 512


def test_held_out_figures_are_those_of_distill() -> None:
    torch.manual_seed(0)
    student = build_model("llama").eval()
    tokens, head = torch.randint(1000, (2, 33)), torch.randn(1000, 64)
    held_out, said = Windows(tokens), torch.randn(64, 64)
    settings = Settings(length=32, tokens=32)
    empty = torch.empty(0)
    found = evaluate(student, settings, Seed(held_out, held_out, empty, said, head, {}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = student.model(tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    q = student.lm_head(hidden.float()).detach()
    everything = Method("topk", 1000)
    rows = as_read(rows_of(said @ head.T, everything, held_out.next_ids, 0, 0), held_out.next_ids)
    theirs = summarize(measured(q, rows, [1.0]))
    for name in ("cross_entropy", "top1_agreement", "calibration_error"):
        assert found[name] == pytest.approx(theirs[name], rel=1e-4)
    assert found["kl"] == pytest.approx(theirs["kl"], rel=1e-2)  # rows are rounded
    accuracy = (q.argmax(dim=1) == held_out.next_ids).float().mean()
    assert found["overconfidence"] == pytest.approx(float(q.softmax(dim=1).amax(dim=1).mean() - accuracy), abs=1e-5)


def test_no_text_is_in_two_parts_and_the_start_is_the_same_for_all_seeds() -> None:
    encoded = [[i] * 20 for i in range(60)]
    settings = Settings(length=8, tokens=16, steps=40, heal=4, held_out=100)
    parts = [split(settings, seed, encoded) for seed in (0, 1)]
    for heal, train, held_out in parts:
        texts = [set(windows.tokens.flatten().tolist()) for windows in (heal, train, held_out)]
        assert not texts[0] & texts[1]
        assert not texts[0] & texts[2]
        assert not texts[1] & texts[2]
        assert len(train.tokens) == 80
        assert len(held_out.tokens) == 12
    assert torch.equal(parts[0][0].tokens, parts[1][0].tokens)
    assert not torch.equal(parts[0][1].tokens, parts[1][1].tokens)
    assert not torch.equal(parts[0][2].tokens, parts[1][2].tokens)


def test_the_whole_study(model_folder: Any, texts: Any, tmp_path: Path) -> None:
    small = "heal=2 steps=4 tokens=64 length=32 held_out=128 rows=256 layers=2 gradient_layers=2 lr=0.003 seeds=2"
    arguments = [*small.split(), "processes=1", f"teacher={model_folder('llama')}", f"texts={texts(24)}"]
    fidelity.main([*arguments, f"out={tmp_path}"])
    found = {part: results["figures"] for part, results in json.loads((tmp_path / "fidelity.json").read_text()).items()}
    assert found["bytes"].keys() == {method.kept for method in METHODS}
    assert found["bytes"]["VarOpt 8"]["ids"] <= 8 < found["bytes"]["VarOpt 16"]["ids"] <= 16
    assert found["bytes"]["text"]["bytes"] < found["bytes"]["VarOpt 8"]["bytes"] < found["bytes"]["top-64"]["bytes"]
    assert found["gradients"].keys() == {method.name for method in METHODS if method.kind != "full"}
    assert found["students"].keys() == {"start", *(method.name for method in STUDENTS)}
    for seed in ("0", "1"):
        of_seed = {name: figures[seed]["kl"] for name, figures in found["students"].items()}
        assert len(set(of_seed.values())) == len(of_seed)  # each learned something else
        assert of_seed["full"] < of_seed["start"]
        assert abs(of_seed["VarOpt 50"] - of_seed["full"]) < abs(of_seed["text"] - of_seed["full"])
    for name in ("gradients", "students"):
        picture = (tmp_path / f"fidelity_{name}.svg").read_text()
        assert all(f">{method.name}<" in picture for method in STUDENTS if method.kind not in ("full", "text"))
    with pytest.raises(SystemExit, match="step"):
        fidelity.main(["step=3"])


def test_the_tables_of_the_page_are_those_of_its_figures() -> None:
    page = (fidelity.DOCS / "fidelity.md").read_text().splitlines()
    lines = [line for line in tables(json.loads((fidelity.DOCS / "fidelity.json").read_text())) if line.startswith("|")]
    assert len(lines) > 3 * len(STUDENTS)
    assert set(lines) <= {*page}
