"""Fixtures: small models with a tokenizer, real texts, and the real command line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.store.seaweedfs import Server
from tests.support import MODELS, WORDS, build_model, generate, generate_here, make_tokenizer, save_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in MODELS to a folder with that model, random, and a tokenizer."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    assert MODELS
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function from a number to a JSONL file of so many texts of very different lengths, an empty one among them."""
    folder = tmp_path_factory.mktemp("texts")

    def file(count: int) -> Path:
        path = folder / f"{count}.jsonl"
        if not path.exists():
            rows: list[dict[str, Any]] = []
            for i in range(count):
                length = 0 if i == 3 else 1 + (i * 7919) % 90
                rows.append({"text": " ".join(WORDS[(i * 31 + j * j) % len(WORDS)] for j in range(length))})
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return file


@pytest.fixture(scope="session")
def small_store(
    texts: Callable[[int], Path], model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store that the real command made of a random Llama and 300 texts: k 8, two temperatures, many blocks."""
    folder = tmp_path_factory.mktemp("store")
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(300)}", "dataset.max_length=96"]
    arguments += ["capture.method=topk", "capture.k=8", "capture.temperatures=[1.0,2.0]", "store.path=small.zarr"]
    arguments += ["store.block_rows=512"]
    ran = generate(folder, *arguments)
    assert ran.returncode == 0, ran.stderr
    return folder / "small.zarr"


@pytest.fixture(scope="session")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama whose distributions are of all kinds, from open to nearly certain."""
    folder, model = tmp_path_factory.mktemp("models") / "sharp", build_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sampled_store(texts: Callable[[int], Path], sharp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of samples of that Llama: at most 16 ids a row, several blocks."""
    folder = tmp_path_factory.mktemp("sampled")
    arguments = [f"teacher.model={sharp_model}", f"dataset.path={texts(120)}", "dataset.max_length=96"]
    arguments += ["capture.k=16", "store.block_rows=512", "store.codec=compact", f"store.path={folder / 'x.zarr'}"]
    return generate_here(folder, *arguments)


@pytest.fixture(scope="session")
def other_teacher(
    texts: Callable[[int], Path], model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store of some texts of `sampled_store`, of another teacher, in other blocks: top-4."""
    folder = tmp_path_factory.mktemp("other")
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(120)}", "dataset.max_length=64"]
    arguments += ["capture.method=topk", "capture.k=4", "capture.temperatures=[2.0,1.0]", "store.block_rows=256"]
    arguments += ["dataset.max_samples=40"]
    return generate_here(folder, *arguments, f"store.path={folder / 'y.zarr'}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server. A test that stops it has to start it again."""
    server = Server(tmp_path_factory.mktemp("s3") / "server")
    yield server
    server.kill()
