"""What is read of a dataset: every form of file, and exactly what was hashed."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.config.generate import GenerateConfig
from distill.data.dataset import find
from distill.errors import DataError
from distill.settings import load
from tests.data.support import decoded, run, write
from tests.support import generate, save_model

TEXTS = ["abc", "", "hello world", "x" * 25, None, "null"]
EXPECTED = [(0, "abc"), (2, "hello world"), (3, "x" * 25), (5, "null")]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.fixture
def sources(tmp_path):
    """The same texts in every form that can be read."""
    rows = [{"text": text, "other": 1} for text in TEXTS]
    lines = write(tmp_path / "x.jsonl", rows).read_bytes()
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    for name, compress in COMPRESS.items():
        half = len(lines) // 2  # in two pieces, as tools that compress in parallel write them
        (tmp_path / f"x.jsonl{name}").write_bytes(compress(lines[:half]) + compress(lines[half:]))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(lines))
    table = "text,other\n" + "".join(f"{'' if text is None else text},1\n" for text in TEXTS)
    (tmp_path / "x.csv").write_text(table)
    (tmp_path / "x.tsv").write_text(table.replace(",", "\t"))
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(text or "" for text in TEXTS).encode())
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "x.parquet")
    saved.save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "x.arrow")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    for folder in ("folder", "halves", "named"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "folder" / "x.jsonl", rows)
    write(tmp_path / "halves" / "1.jsonl", rows[:3])
    (tmp_path / "halves" / "2.txt").write_text("\n".join(text or "" for text in TEXTS[3:]))
    write(tmp_path / "named" / "train-0.jsonl", rows)
    write(tmp_path / "named" / "test-0.jsonl", rows[:1])
    write(tmp_path / "named" / "extra.jsonl", rows[:1])
    return tmp_path


ONE_FILE = ["x.jsonl", "lines.json", "list.json", "object.json", "bom.jsonl", "x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz"]
ONE_FILE += ["x.jsonl.zst", "x.json.gz", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.arrow"]
FORMS = [*ONE_FILE, "saved", "splits", "folder", "halves", "named", "hal*/*"]


@pytest.mark.parametrize("name", FORMS)
def test_every_source_gives_the_same_samples(sources, name, monkeypatch):
    """No library's cache is read or written, be it read-only or full."""
    for variable in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(variable, "/proc/nowhere")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")
    samples = run(f"dataset.path={sources / name}")
    assert decoded(samples) == EXPECTED
    assert "loss_mask" not in samples.columns


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_was_replaced_is_read_anew(sources, name):
    """tar, cp -p, rsync -t, DVC and container layers keep the time of modification."""
    path = f"dataset.path={sources / name}"
    for file in [entry for entry in sources.rglob("*") if entry.is_file()]:
        os.utime(file, (1, 1))
    before = find(load(GenerateConfig, [path]).dataset).identity
    assert decoded(run(path)) == EXPECTED
    other = [{"text": (text or "").upper(), "other": 1} for text in TEXTS]
    for file in [entry for entry in sources.rglob("*") if entry.is_file()]:
        content = file.read_bytes()
        if file.suffix == ".arrow":
            content = content.replace(b"abc", b"ABC").replace(b"hello world", b"HELLO WORLD")
            content = content.replace(b"x" * 25, b"X" * 25).replace(b"nullnull", b"null")
        elif file.suffix == ".parquet":
            datasets.Dataset.from_list(other).to_parquet(file)
            content = file.read_bytes()
        elif file.suffix in COMPRESS:
            plain = (sources / "x.jsonl").read_bytes().lower().replace(b"abc", b"ABC").replace(b"x" * 25, b"X" * 25)
            content = COMPRESS[file.suffix](plain.replace(b"hello world", b"HELLO WORLD"))
        elif file.suffix != ".json" or file.parent == sources:
            content = content.replace(b"abc", b"ABC").replace(b"hello world", b"HELLO WORLD")
            content = content.replace(b"x" * 25, b"X" * 25)
        file.unlink()
        file.write_bytes(content)
        os.utime(file, (1, 1))
    assert find(load(GenerateConfig, [path]).dataset).identity != before
    assert [(i, text.upper()) for i, text in decoded(run(path))] == [(i, text.upper()) for i, text in EXPECTED]
    assert decoded(run(path))[0] == (0, "ABC")


def test_a_file_that_changes_between_hashing_and_reading_is_refused(sources):
    config = load(GenerateConfig, [f"dataset.path={sources / 'x.jsonl'}"]).dataset
    data = find(config)
    times = (sources / "x.jsonl").stat()
    assert data.identity
    content = (sources / "x.jsonl").read_text()
    (sources / "x.jsonl").write_text(content.replace("abc", "abd"))
    os.utime(sources / "x.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert list(data.rows())
    with pytest.raises(DataError, match=r"x\.jsonl changed while it was read"):
        data.check_unchanged()


def test_identity_follows_the_content(sources):
    def of(*arguments):
        return find(load(GenerateConfig, arguments).dataset).identity

    before = of(f"dataset.path={sources / 'x.jsonl'}")
    assert before == of(f"dataset.path={sources / 'folder' / 'x.jsonl'}")  # wherever it is
    assert before == of("dataset.path=json", f"dataset.data_files={sources / 'x.jsonl'}")
    assert before == of(f"dataset.data_files=[{sources / 'x.jsonl'}]")
    (sources / "x.jsonl").write_text((sources / "x.jsonl").read_text().replace("abc", "abd"))
    assert before != of(f"dataset.path={sources / 'x.jsonl'}")
    assert of("dataset.path=some/hub-id")["dataset.remote"] == ["some/hub-id"]
    assert of("dataset.path=some/hub-id", "dataset.data_files=a*")["dataset.remote"] == ["some/hub-id", "a*"]
    before = of(f"dataset.path={sources / 'folder'}")
    (sources / "folder" / "mine.zarr").mkdir()
    (sources / "folder" / "mine.zarr" / "zarr.json").write_text("{}")  # a run's own store in the folder is no data
    assert before == of(f"dataset.path={sources / 'folder'}")
    template = sources / "t.jinja"
    template.write_text("a")
    before = of(f"dataset.chat_template={template}")
    template.write_text("b")
    assert before != of(f"dataset.chat_template={template}")


def test_large_files_are_hashed_to_the_last_byte(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"x" * (65 << 20))
    before = find(load(GenerateConfig, [f"dataset.path={file}"]).dataset).identity
    with file.open("r+b") as opened:
        opened.seek(1_050_000)  # between two pieces that a sample of the file would have
        opened.write(b"y")
    assert before != find(load(GenerateConfig, [f"dataset.path={file}"]).dataset).identity


def test_splits_globs_and_what_names_leave_out(sources, caplog):
    assert len(run(f"dataset.path={sources / 'splits'}", "dataset.split=test").lengths) == 1
    assert len(run(f"dataset.path={sources / 'named'}", "dataset.split=test").lengths) == 1
    run(f"dataset.path={sources / 'named'}")
    assert "did not read extra.jsonl" in caplog.text
    assert len(run(f"dataset.path={sources / 'named'}", "dataset.data_files=[extra.jsonl,te*]").lengths) == 2
    assert len(run(f"dataset.path={sources / 'named'}/te*.jsonl").lengths) == 1
    for name in ("splits", "named"):
        with pytest.raises(DataError, match=r"dataset\.split: expected .*train.*, found validation"):
            run(f"dataset.path={sources / name}", "dataset.split=validation")
    with pytest.raises(DataError, match=r"dataset\.split: expected train, .* found test"):
        run(f"dataset.path={sources / 'x.jsonl'}", "dataset.split=test")
    (sources / "named" / "both.json").write_text('{"train": [{"text": "a"}], "test": [{"text": "bc"}]}')
    assert decoded(run(f"dataset.path={sources / 'named' / 'both.json'}", "dataset.split=test")) == [(0, "bc")]
    (sources / "named" / "both.json").unlink()
    (sources / "named" / "train-0.jsonl").unlink()  # one split is left
    assert len(run(f"dataset.path={sources / 'named'}").lengths) == 1
    assert "took the only split, test" in caplog.text
    card = sources / "folder" / "README.md"
    write(sources / "folder" / "y.jsonl", [{"text": "why"}])
    card.write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: x.jsonl\n- config_name: b\n  data_files: y.jsonl\n---\n"
    )
    assert decoded(run(f"dataset.path={sources / 'folder'}", "dataset.name=a")) == EXPECTED
    assert decoded(run(f"dataset.path={sources / 'folder'}", "dataset.name=b")) == [(0, "why")]


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "broken line": ("x.jsonl", '{"text": "a"}\n{"text\n', r"x\.jsonl line 2: expected JSON"),
    "no object": ("x.jsonl", '{"text": "a"}\n[1]\n', r"x\.jsonl line 2: expected an object"),
    "empty": ("x.jsonl", "", "found no rows"),
    "number": ("x.jsonl", '{"text": "a"}\n{"text": 5}\n', "'text' of example 1, found 5"),
    "a list": ("x.jsonl", '{"text": [5]}\n', "expected text in 'text' of example 0, found"),
    "half a character": ("x.jsonl", '{"text": "a"}\n{"text": "b\\ud83d"}', "of example 1, found half of"),
    "no list": ("x.json", '{"a": 1,\n "b": 2}', "expected a list of objects in its object, found none"),
    "two lists": ("x.json", '{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "found a and b"),
    "cut short": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], r"cannot read .*x\.jsonl\.gz"),
    "not compressed": ("x.jsonl.zst", b"text", r"cannot read .*x\.jsonl\.zst"),
    "another encoding": ("x.txt", "é".encode("latin-1"), r"x\.txt: expected UTF-8"),
    "too many fields": ("x.csv", "text,b\na,b,c\n", r"x\.csv line 2: expected 2 fields, found 3"),
    "an open quote": ("x.csv", 'text,b\n"a,b\nc,d\n', r"x\.csv line 1: unexpected end of data"),
    "two columns of one name": ("x.csv", "text,text\na,b\n", r"x\.csv line 1: .* found text twice"),
    "no form": ("x.jsonl", '{"a": 1, "b": 2}', "expected columns as in docs/data.md .* found a, b"),
    "not a file of data": ("x.png", "x", "expected files named .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_line(tmp_path, name):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        run(f"dataset.path={tmp_path / file}")


def test_words_that_pandas_takes_for_nothing_are_text(tmp_path):
    words = ["NA", "None", "null", "nan", "N/A", "NaN", "1e5", "007"]
    (tmp_path / "x.csv").write_text("text\n" + "\n".join(words))
    assert [text for _, text in decoded(run(f"dataset.path={tmp_path / 'x.csv'}"))] == words


def test_a_column_that_is_not_used_may_be_anything(tmp_path):
    rows = [{"text": "ab", "other": 1}] * 3000 + [{"text": "cd", "other": {"c": "d"}}, {"text": "ef"}]
    path = write(tmp_path / "x.jsonl", rows)
    assert len(run(f"dataset.path={path}").lengths) == 3002


def test_files_of_one_folder_must_be_alike(tmp_path):
    write(tmp_path / "1.jsonl", [{"messages": []}])
    (tmp_path / "LICENSE.txt").write_text("free")
    with pytest.raises(DataError, match=r"expected a column messages in .*LICENSE\.txt, as in .*dataset\.data_files"):
        list(find(load(GenerateConfig, [f"dataset.path={tmp_path}"]).dataset).rows(["messages"], needed=["messages"]))


def test_a_run_writes_nothing_beside_the_data(sources, tmp_path_factory):
    """Neither into the folder of the data nor into a cache; with HOME unset, too."""
    folder = tmp_path_factory.mktemp("run")
    model = save_model("llama", folder / "model")
    before = sorted(map(str, sources.rglob("*")))
    arguments = [f"teacher.model={model}", f"dataset.path={sources / 'saved'}", "capture.k=4", "store.path=x.zarr"]
    ran = generate(folder, *arguments, HOME="/", HF_HOME="/proc/nowhere", TMPDIR=str(folder))
    assert ran.returncode == 0, ran.stderr
    assert before == sorted(map(str, sources.rglob("*")))
    assert sorted(entry.name for entry in folder.iterdir()) == ["logs", "model", "x.zarr"]
    assert "6 examples" in ran.stderr
    assert "dropped 1 null, 1 empty" in ran.stderr


def test_a_dataset_of_the_hub(monkeypatch):
    """What `datasets` loads is read in full, by split; a stream has no number of rows, and perhaps no columns."""
    asked = []

    def load_dataset(path, name, data_files, split, streaming):
        asked.append((path, name, data_files, split, streaming))
        made = datasets.Dataset.from_list([{"text": text, "other": {"a": i}} for i, text in enumerate(TEXTS)])
        made = made.to_iterable_dataset() if streaming else made
        if split is not None:
            return made
        return datasets.IterableDatasetDict({"test": made}) if streaming else datasets.DatasetDict({"test": made})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in ("false", "true"):
        arguments = ["dataset.path=some/id", "dataset.name=all", f"dataset.streaming={streaming}"]
        assert decoded(run(*arguments)) == EXPECTED  # the only split
        assert decoded(run(*arguments, "dataset.split=train[:50%]")) == EXPECTED
        with pytest.raises(DataError, match=r"dataset\.split: expected test, found validation"):
            run(*arguments, "dataset.split=validation")
    assert ("some/id", "all", None, None, True) in asked
    assert ("some/id", "all", None, "train[:50%]", False) in asked


def test_what_would_be_ignored_or_is_misspelt_is_refused(sources):
    for more, key in (("dataset.data_files=x.csv", "data_files"), ("dataset.name=all", "name")):
        with pytest.raises(DataError, match=rf"dataset\.{key}: expected none beside the file .*x\.jsonl, found"):
            run(f"dataset.path={sources / 'x.jsonl'}", more)
    with pytest.raises(DataError, match=r"found no file or folder data/nowhere\.jsonl"):
        run("dataset.path=data/nowhere.jsonl")


def test_rollouts_are_read_when_they_are_whole(tmp_path):
    """distill.rollout's own folder: its parts in order, and nothing else; a part that is missing is not overlooked."""
    table = {"prompt_ids": [[1, 40]], "completion_ids": [[41, 2]], "logprobs": [[-0.5, -1.0]], "completion_text": ["!"]}
    for number in (1, 0):
        pa.parquet.write_table(
            pa.table(table | {"prompt_ids": [[1, 40 + number]]}), tmp_path / f"part_{number}.parquet"
        )
    (tmp_path / "part_2.parquet.partial").write_bytes(b"half")
    (tmp_path / "rollouts.json").write_text(json.dumps({"parts": 2, "rows": [{"text": "no data"}]}))
    samples = run(f"dataset.path={tmp_path}")
    assert samples.take([0, 1])["tokens"].tolist() == [1, 40, 41, 2, 1, 41, 41, 2]
    assert samples.take([1])["loss_mask"].tolist() == [False, True, True, False]
    assert samples.take([1])["sampled_logprob"][1:3].tolist() == [-0.5, -1.0]
    (tmp_path / "part_0.parquet").unlink()
    with pytest.raises(DataError, match=r"expected 2 parts of rollouts in .*, found 1: run distill.rollout again"):
        run(f"dataset.path={tmp_path}")
    assert len(run(f"dataset.path={tmp_path}", "dataset.data_files=part_*.parquet").lengths) == 1


def test_files_without_a_path_are_read_and_not_the_demo(sources):
    assert decoded(run(f"dataset.data_files={sources / 'x.jsonl'}")) == EXPECTED
