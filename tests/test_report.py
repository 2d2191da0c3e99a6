"""The report: its values are those of the store and of the students, and a real browser shows them."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import TeacherCache
from distill.page.figures import of_store, of_students
from distill.page.look import Look, by_position, look
from distill.page.words import Words, pieces
from distill.report import main
from tests.support import environment, generate_here, make_tokenizer, open_raw, reseal, save_model, tree

CHROMIUM = shutil.which("chromium")
NASTY = [
    "</script><script>document.title='x'</script>",
    "<img src=x onerror=\"document.title='x'\">",
    "a\n\n\tb  c 👩‍👩‍👧 שלום é�",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of chats whose texts try to be more than texts: x.zarr, k 8, with a loss mask."""
    folder = tmp_path_factory.mktemp("report")
    save_model("llama", folder / "model", chat=True)
    with (folder / "x.jsonl").open("w") as file:
        for i in range(24):
            chat = [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": NASTY[i % 3] * (1 + i % 2)},
            ]
            print(json.dumps({"messages": chat}), file=file)
    arguments = [f"teacher.model={folder / 'model'}", f"dataset.path={folder / 'x.jsonl'}", "capture.method=topk"]
    generate_here(folder, *arguments, "capture.k=8", f"store.path={folder / 'x.zarr'}", "store.block_rows=512")
    return folder


@pytest.fixture(scope="module")
def student(chats: Path) -> Path:
    """The folder of a training run of two steps on that store."""
    settings = ["store.path=x.zarr", "student.layers=1", "optimizer.steps=2", "evaluation.samples=6", "batch.readers=0"]
    command = [
        sys.executable,
        "-m",
        "distill.train",
        *settings,
        "evaluation.every=1",
        "output=student",
        "batch.samples=4",
    ]
    ran = subprocess.run(
        command, cwd=chats, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    return chats / "student"


def content(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id=data>(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def shown_samples(page: Path) -> list[int]:
    return [int(number) for number in re.findall(r"<h3>[a-z ]+: sample (\d+),", page.read_text())]


def test_the_values_are_those_of_the_store(chats: Path) -> None:
    """Read with zarr alone: token i is tinted by row i - 1, and shows what that row expects."""
    file = chats / "out" / "report.html"
    before = tree(chats / "x.zarr")
    assert main([str(chats / "x.zarr"), "-o", str(file)]) == 0
    assert tree(chats / "x.zarr") == before
    data, numbers = content(file), shown_samples(file)
    names = ("tokens", "loss_mask", "next_logprob", "target_ids", "target_logprobs", "sample_start", "sample_length")
    store = {name: open_raw(chats / "x.zarr", name) for name in names}
    tokenizer = make_tokenizer(chat=True)
    assert len(numbers) == len(data["samples"]) == len({*numbers}) == 9
    for number, tokens in zip(numbers, data["samples"], strict=True):
        start, length = int(store["sample_start"][number]), int(store["sample_length"][number])
        ids = store["tokens"][start : start + length]
        assert "".join(token[0] for token in tokens) == tokenizer.decode(ids)
        assert tokens[0][1:4] == [None, 1, None]
        for i in range(1, length):
            _, loss, off, expected, own = tokens[i]
            row = start + i - 1
            assert off == (0 if store["loss_mask"][row] else 1)
            assert loss == pytest.approx(-float(store["next_logprob"][row]), abs=1e-4)
            chances = np.exp(store["target_logprobs"][row].astype(float))
            assert [p for _, p in expected] == pytest.approx(chances[:5].tolist(), abs=1e-5)
            words = Words(tokenizer)
            assert [data["words"][word] for word, _ in expected] == [
                words.words[words.number(int(token))] for token in store["target_ids"][row][:5]
            ]
            assert data["words"][own] == words.words[words.number(int(ids[i]))]


def test_of_a_long_chat_what_is_trained_on_is_shown(chats: Path, tmp_path: Path) -> None:
    from distill.page.html import Page

    sample = TeacherCache(str(chats / "x.zarr"))[0]
    parts = {
        name: value[:1].repeat(500, *[1] * (value.dim() - 1)) for name, value in sample.items() if name != "sample"
    }
    parts["loss_mask"] = torch.arange(500) >= 450
    parts["tokens"] = torch.arange(500) % 250
    page = Page(make_tokenizer(chat=True), "topk")
    page.tokens(
        Look(1, 500, np.array([500]), np.ones(1), np.ones(1), np.zeros((0, 4)), {"random": [{"sample": 7, **parts}]})
    )
    page.save("x", tmp_path / "x.html")
    data = content(tmp_path / "x.html")
    (tokens,) = data["samples"]
    words = Words(make_tokenizer(chat=True))
    assert [data["words"][token[4]] for token in tokens] == [
        words.words[words.number(i % 250)] for i in range(100, 500)
    ]
    assert [token[2] for token in tokens] == [int(i <= 450) for i in range(100, 500)]


def test_figures_over_rows(chats: Path) -> None:
    found = look(TeacherCache(str(chats / "x.zarr")))
    used = ~np.isnan(open_raw(chats / "x.zarr", "tail_logprob")[:, 0].astype(float))
    p = np.exp(open_raw(chats / "x.zarr", "target_logprobs")[used].astype(float))
    assert found.num_tokens == used.sum() == len(found.entropy)
    assert found.mass == pytest.approx(p.cumsum(axis=1).mean(axis=0), abs=1e-6)
    mask = open_raw(chats / "x.zarr", "loss_mask")
    nll = -open_raw(chats / "x.zarr", "next_logprob")[mask].astype(float)
    assert (found.positions[:, 1] @ found.positions[:, 2]) / len(nll) == pytest.approx(nll.mean(), rel=1e-6)
    assert found.positions[:, 1].sum() == len(nll)
    means = {
        kind: [-float(one["next_logprob"][one["loss_mask"]].mean()) for one in samples]
        for kind, samples in found.shown.items()
    }
    assert min(means["most surprising"]) >= max(means["typical"] + means["random"])
    rows = by_position([(np.array([1, 1, 30]), np.array([1.0, 3.0, 5.0]))])
    assert rows.tolist() == [[0, 2, 2, 1], [30, 1, 5, 0]]


@pytest.mark.parametrize("has_tail", [True, False])
def test_rows_of_which_nothing_is_said_count_for_nothing(has_tail: bool, chats: Path) -> None:
    """As what others captured has them: rows without ids, and perhaps no tail anywhere."""

    class Captured:
        attributes, temperatures, lengths = {"k": 8}, [1.0], [40]
        plain = TeacherCache(str(chats / "x.zarr"))[0]

        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> Any:
            sample = {name: value.clone() if name != "sample" else value for name, value in self.plain.items()}
            sample["target_ids"][:7], sample["target_logprobs"][:7] = -1, torch.nan
            sample["tail_logprob"][:7] = torch.nan
            return sample if has_tail else {name: value for name, value in sample.items() if name != "tail_logprob"}

    cache: Any = Captured()
    found, p = look(cache), cache.plain["target_logprobs"][7:].exp()
    plots = of_store(found, "topk")
    if has_tail:
        assert found.mass == pytest.approx(p.cumsum(dim=1).mean(dim=0).numpy(), abs=1e-6)
        assert np.isfinite(found.entropy).all()
        assert len(found.entropy) == len(p)
        assert f"({float(p.sum(dim=1).mean()):.2f})" in "".join(plots)
    else:
        assert len(plots) == 2  # lengths, and the loss by position
    assert "nan" not in "".join(plots)


def test_old_and_sampled_stores(sampled_store: Path, sharp_model: Path, tmp_path: Path) -> None:
    """Drawn ids have no probability. Without a tokenizer tokens are ids; without next_logprob nothing is tinted."""
    file = tmp_path / "a.html"
    assert main([str(sampled_store), "-o", str(file)]) == 0
    data = content(file)
    drawn = [pair for sample in data["samples"] for token in sample[1:] for pair in token[3] if pair[1] is None]
    assert drawn
    old = tmp_path / "old.zarr"
    shutil.copytree(sampled_store, old)
    cache = TeacherCache(str(old))
    sample = {name: values for name, values in cache[0].items() if name != "next_logprob"}
    assert len(by_position([(np.zeros(0, np.int64), np.zeros(0))])) == 0
    from distill.page.html import Page

    page = Page(None, "sample")
    nothing = np.zeros((0, 4))
    seen = Look(1, 9, np.array([9]), np.ones(16), np.ones(9), nothing, {"random": [sample]})
    page.tokens(seen)
    page.store(seen)
    page.save("x", tmp_path / "b.html")
    tokens = content(tmp_path / "b.html")["samples"][0]
    assert all(token[1] is None for token in tokens)
    assert tokens[3][0] == f" #{int(sample['tokens'][3])}"
    assert "nothing is tinted" in (tmp_path / "b.html").read_text()


def test_students(
    chats: Path, student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are those of its metrics, continuations those of transformers, differences those of dense logits."""
    from transformers import AutoModelForCausalLM

    file = chats / "with.html"
    monkeypatch.chdir(chats)  # where the student was trained, on x.zarr
    assert main([str(chats / "x.zarr"), str(student), "--teacher", "-o", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"report  {file} (")
    text, data = file.read_text(), content(file)
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    for figure in ("cross_entropy", "kl"):
        assert f"{held_out[0][figure]:.4f}" in text
        assert f"{held_out[-1][figure]:.4f}" in text
    cache, tokenizer = TeacherCache(str(chats / "x.zarr")), make_tokenizer(chat=True)
    _, samples = cache.split(6, 0)
    first = samples[0]
    at = int(first["loss_mask"].nonzero()[0]) + 1
    beginning = first["tokens"][:at]
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in
              (("student", student), ("the teacher", chats / "model"))}  # fmt: skip
    from html import escape

    for name, model in models.items():
        said = model.generate(beginning[None], max_new_tokens=32, do_sample=False, pad_token_id=0)[0, at:].tolist()
        assert f"<dt>{name}</dt><dd class=text dir=auto>{escape(''.join(pieces(tokenizer, said)))}</dd>" in text
    assert "<dt>before</dt>" in text
    assert "Beginnings of held-out samples continued" in text
    # The largest divergence of all is the first one shown.
    largest = 0.0
    for sample in (samples[i] for i in range(len(samples))):
        with torch.no_grad():
            q = models["student"](sample["tokens"][None]).logits[0].double().log_softmax(dim=1)
        p, ids = sample["target_logprobs"].double(), sample["target_ids"]
        events = torch.cat([p, sample["tail_logprob"][:, :1].double()], dim=1).log_softmax(dim=1)
        own = q.gather(1, ids)
        rest = torch.log1p(-own.exp().sum(dim=1, keepdim=True))
        apart = (events.exp() * (events - torch.cat([own, rest], dim=1))).sum(dim=1)
        largest = max(largest, float(apart[sample["loss_mask"]].max()))
    shown = [float(value) for value in re.findall(r", KL ([\d.]+) nats", text)]
    assert shown[0] == pytest.approx(largest, abs=0.006)
    assert shown == sorted(shown, reverse=True)
    assert all(len(expected) == 5 for expected, _ in data["bars"])
    shutil.copytree(student, chats / "demo")  # a name that means the demo's teacher elsewhere
    assert main(["x.zarr", "student", "demo", "-o", "demo.html"]) == 0
    assert content(chats / "demo.html")["bars"] == data["bars"] * 2
    text = (chats / "demo.html").read_text()
    assert text.count("<dt>student</dt>") == text.count("<dt>demo</dt>") == text.count("<dt>before</dt>") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_a_browser_shows_it(browser: Any, chats: Path, student: Path, width: int, scheme: str) -> None:
    file = chats / f"{scheme}{width}.html"
    assert main([str(chats / "x.zarr"), str(student), "-o", str(file)]) == 0
    data = content(file)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=width < 500)
    page = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert page.title() == "x.zarr - distill"
    assert said == []
    assert requests == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (light > 128) == (scheme == "light")
    assert page.locator("figure svg").count() == 6
    for box in (page.locator("figure svg").nth(i).bounding_box() for i in range(6)):
        assert box["width"] > 200
        assert box["height"] > 100
    assert page.locator("[data-bars] .bar").count() == 5 * len(data["bars"])

    tokens = page.locator("[data-sample='1'] .t")
    assert tokens.count() == len(data["samples"][1])
    tip = page.locator("#tip")

    def shows(i: int) -> None:
        _, loss, _, expected, own = data["samples"][1][i]
        assert tip.is_visible()
        assert tip.locator("b").inner_text() == data["words"][own]
        assert f"{loss:.2f} nats" in tip.inner_text()
        assert tip.locator(".bars .word").all_inner_texts() == [data["words"][word] for word, _ in expected]
        chances = tip.locator(".bars .num").all_inner_texts()
        for chance, (_, p) in zip(chances, expected, strict=True):
            assert chance == "<0.1%" if p < 0.001 else math.isclose(float(chance[:-1]) / 100, p, abs_tol=0.006)
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width

    if width < 500:
        tokens.nth(7).tap()
        shows(7)
    else:
        tokens.nth(7).hover()
        shows(7)
        page.mouse.move(0, 0)
        assert tip.is_hidden()
        tokens.nth(3).focus()
        shows(3)
        assert tokens.nth(3).get_attribute("aria-describedby") == "tip"
        page.keyboard.press("ArrowRight")
        shows(4)
        page.keyboard.press("Escape")
        assert tip.is_hidden()
    assert page.title() == "x.zarr - distill"
    assert said == []
    context.close()


def test_mistakes_are_one_line(chats: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, other = str(chats / "x.zarr"), chats / "other" / "student"
    shutil.copytree(student, other, dirs_exist_ok=True)
    unfinished = chats / "unfinished"
    shutil.copytree(student, unfinished, dirs_exist_ok=True)
    (unfinished / "tokenizer_config.json").unlink()
    (chats / "file").write_text("")
    (chats / "link.html").symlink_to(chats / "file")
    odd = chats / "odd.yaml"
    odd.symlink_to(chats / "x.zarr")
    strange = chats / "strange.zarr"
    shutil.copytree(chats / "x.zarr", strange)
    reseal(strange, tokenizer=TeacherCache(store).attributes["tokenizer"] | {"vocab_digest": "0" * 16})
    for arguments, words in (
        ([], "expected a store, found none"),
        ([str(chats / "nothing.zarr")], "found no store"),
        ([store, str(chats / "model")], "expected the folder of a training run"),
        ([store, str(unfinished)], "expected a finished training run"),
        ([str(strange), str(student)], "did not learn from this store"),
        ([store, str(student), str(other)], "different names"),
        ([store, "--teacher"], "--teacher: expected the folders of students"),
        ([store, "--what"], "unknown option --what"),
        ([store, "-o"], "-o: expected a file"),
        ([store, "-o", str(chats)], "-o: expected a file that can be written"),
        ([store, "-o", str(chats / "link.html")], "-o: expected a file that can be written"),
        ([store, "-o", str(chats / ("x" * 300))], "-o: expected a file that can be written"),
        ([store, "-o", f"{store}/x.html"], "-o: expected a folder outside of stores"),
        ([store, "-o", "https://h/x.html"], "-o: expected a local file"),
        ([store, "teacher.model=x"], "teacher.model: expected --teacher with it"),
        ([store, str(student), "--teacher", "teacher.model=nosuch"], "teacher.model=nosuch"),
        ([str(odd), str(chats / "model"), "-o", "x.yaml"], "expected the folder of a training run"),
        ([store, "-o", str(chats / "file" / "x.html")], "-o: expected a file that can be written"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1


def test_names_are_no_formulas() -> None:
    lines = [{"step": step, "held_out": {"cross_entropy": 3.0 - step, "kl": None if step else 1.0}} for step in (0, 1)]
    names = ["a$^$b", "_hidden", "<b>&", "two\nlines"]
    for svg in of_students(dict.fromkeys(names, lines)).values():
        shown = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert {"a$^$b", "_hidden", "&lt;b&gt;&amp;", "two lines"} <= {*shown}, shown


def test_a_character_of_several_tokens_is_whole() -> None:
    tokenizer = make_tokenizer()
    text = "x 👩‍👩‍👧 é שלום\n\n b"
    found = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text
    assert len(found) == len(text.encode())
    broken = list("é".encode())[:1] * 9  # never a character
    assert "�" in "".join(pieces(tokenizer, [tokenizer(chr(200))["input_ids"][0]] * len(broken)))
