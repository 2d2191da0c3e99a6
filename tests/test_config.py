import re
from pathlib import Path

import pytest

from distill.config.exchange import ExportConfig, IngestConfig
from distill.config.generate import GenerateConfig
from distill.config.rollout import RolloutConfig
from distill.config.train import TrainConfig
from distill.errors import ConfigError
from distill.settings import _leaves, help_text, load, to_yaml


def test_later_wins(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("capture: {k: 8}\nbatch: {max_tokens: 100}\n")
    second.write_text("capture: {k: 9}\n")
    config = load(GenerateConfig, ["batch.max_tokens=300", str(first), str(second)])
    assert (config.capture.k, config.batch.max_tokens, config.capture.seed) == (9, 300, 0)
    assert load(GenerateConfig, []) == GenerateConfig()


def test_the_resolved_config_reads_back(tmp_path):
    words = ["1e10", "null", "no", "012", "a: b #c", "~", "${x}", "\udcff", " two\nlines "]
    for word in words:
        typed = [
            "capture.method=topk",
            "capture.temperatures=[1.0, 4]",
            f"teacher.revision={word}x",
            "dataset.name=0012",
            "dataset.split=null",
        ]
        config = load(GenerateConfig, [*typed, f"log_dir=x{word}"])
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load(GenerateConfig, [str(tmp_path / "config.yaml")]) == config
        assert config.capture.temperatures == [1.0, 4.0]
        assert (config.dataset.name, config.dataset.split, config.teacher.revision) == ("0012", "null", f"{word}x")


def test_several_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["store.path=[~/a.zarr,s3://b/c.zarr, d e.zarr]", "store.weights=[0.7,3,1e-3]"]
    config = load(TrainConfig, typed)
    assert config.store.path == ["/home/me/a.zarr", "s3://b/c.zarr", "d e.zarr"]
    assert config.store.weights == [0.7, 3.0, 0.001]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(TrainConfig, [str(tmp_path / "config.yaml")]) == config
    assert load(TrainConfig, ["store.path=a.zarr"]).store.path == "a.zarr"
    for argument, message in (
        ("store.path=[]", r"store\.path: expected a store, or a list of several, found \[\]"),
        ("store.path=[a.zarr,null]", r"store\.path: expected text, found null"),
        ("store.weights=[0.7,.nan]", r"store\.weights: expected a number, found '?\.nan"),
        ("store.weights=0.7", r"store\.weights: expected a list of a number or null, found '0\.7'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(TrainConfig, [argument])
    (tmp_path / "list.yaml").write_text("store: {path: [a.zarr, b.zarr]}")
    with pytest.raises(ConfigError, match=r"store\.path: expected text, found \['a\.zarr', 'b\.zarr'\]"):
        load(GenerateConfig, [str(tmp_path / "list.yaml")])  # one store is written


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("capture.k=abc", "capture.k: expected an integer, found 'abc'"),
        ("capture.k=0", "capture.k: expected at least 1, found 0"),
        ("timeout_seconds=0", "timeout_seconds: expected at least 1, found 0"),
        ("captur.k=1", "unknown key captur.k; did you mean capture.k?"),
        ("k=1", "unknown key k; did you mean capture.k?"),
        ("nothing_like_it=1", "unknown key nothing_like_it; --help lists the keys"),
        ("teacher=5", "teacher: expected keys below it"),
        ("teacher.trust_remote_code=maybe", "teacher.trust_remote_code: expected true or false, found 'maybe'"),
        ("capture.temperatures=[2.0]", "expected different positive numbers, 1.0 among them"),
        ("capture.temperatures=[1.0,hot]", "capture.temperatures: expected a number, found 'hot'"),
        ("capture.temperatures=1.0", "capture.temperatures: expected a list of a number, found '1.0'"),
        ("capture.temperatures=[1.0", "capture.temperatures: expected YAML, found"),
        ("dataset.max_length=1", "dataset.max_length: expected auto or at least 2"),
        ("dataset.data_files=[a: 1]", "dataset.data_files: expected text, found {'a': '1'}"),
        ("dataset.data_files=[a,null]", "dataset.data_files: expected text, found null"),
        ("dataset.long=wrap", "dataset.long: expected split, truncate, drop, found 'wrap'"),
        ("store.block_rows=0", "store.block_rows: expected auto or at least 1, found 0"),
        ("parallel.shard_size=half", "parallel.shard_size: expected auto or at least 1, found 'half'"),
        ("dataset.streaming=yes", "dataset.streaming: expected true or false, found 'yes'"),
        ("store.path=", "store.path: expected text, found nothing"),
        (
            "store.path=~nobody-of-this-name/x",
            "store.path: expected a home folder for ~nobody-of-this-name, found none",
        ),
        (
            "store.options.client_options.timeout=012",
            r"store.options.client_options.timeout: .*found another value \(h",
        ),
        ("lr=2/missing.yaml", "lr=2/missing.yaml: no such file"),
    ],
)
def test_refusals(argument, message):
    with pytest.raises(ConfigError, match=message):
        load(GenerateConfig, [argument])


def test_refusals_name_the_file(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("capture: {kk: 3}\n")
    with pytest.raises(ConfigError, match=r"bad.yaml: unknown key capture.kk; did you mean capture.k\?"):
        load(GenerateConfig, [str(bad)])
    for content, message in (
        ("capture: {temperatures: null}", "capture.temperatures: expected a list of a number, found null"),
        ("capture: {temperatures: {a: 1.0}}", "capture.temperatures: expected a list of a number, found {'a': '1.0'}"),
        ("dataset: {data_files: {train: a}}", "dataset.data_files: expected text or a list of text or null, found {"),
        ("dataset: {path: [a]}", r"dataset.path: expected text, found \['a'\]"),
        ("store: {options: x}", r"store.options: expected a mapping, found another value \(hidden\)"),
        ("capture: {k: 8, k: 9}", r"not readable as YAML: k is there twice \(line 1\)"),
        ("capture: {k: [}", "not readable as YAML: "),
    ):
        bad.write_text(content)
        with pytest.raises(ConfigError, match=f"bad.yaml: {message}") as refused:
            load(GenerateConfig, [str(bad)])
        assert "\n" not in str(refused.value)
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load(GenerateConfig, [str(bad)])


def test_help_lists_every_key_with_its_default():
    text = help_text(GenerateConfig, "x")
    for words in ("capture.k=24", "dataset.max_length=auto", "store.path=outputs/demo.zarr", "teacher.revision=null"):
        assert words in text


TEXTS = [
    "0123456",
    "1e10",
    "no",
    "012",
    "1:30",
    "on",
    "2024-01-01",
    "out/run #3",
    "'a'",
    "$HOME",
    "${x",
    "a: b",
    "[a",
    " a ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_typed(text: str) -> None:
    """For each key of text: what YAML would take for a number, a boolean, a date, a comment or a list."""
    names = ["teacher.revision", "dataset.name", "dataset.text_column", "store.path", "store.options.region", "log_dir"]
    names += ["dataset.data_files", "teacher.model", "dataset.path"]
    config = load(GenerateConfig, [f"{name}={text}" for name in names])
    assert (config.teacher.revision, config.dataset.name, config.dataset.text_column) == (text, text, text)
    assert (config.store.path, config.store.options, config.log_dir) == (text, {"region": text}, text)
    assert (config.dataset.data_files, config.teacher.model, config.dataset.path) == (text, text, text)


def test_null_is_none_only_where_it_may_be(tmp_path: Path) -> None:
    config = load(GenerateConfig, ["dataset.name=null", "dataset.split=null", "dataset.max_length=null"])
    assert (config.dataset.name, config.dataset.split, config.dataset.max_length) == (None, "null", None)
    (tmp_path / "x.yaml").write_text("dataset: {name: 'null', max_length: null, data_files: ~}")
    config = load(GenerateConfig, [str(tmp_path / "x.yaml")])
    assert (config.dataset.name, config.dataset.max_length, config.dataset.data_files) == ("null", None, None)
    (tmp_path / "x.yaml").write_text("dataset: {split: null}")
    with pytest.raises(ConfigError, match=r"x.yaml: dataset.split: expected text, found null"):
        load(GenerateConfig, [str(tmp_path / "x.yaml")])


def test_lists_of_text_are_text() -> None:
    for typed, files in (
        ("[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("[0123,no, 'a, b']", ["0123", "no", "a, b"]),
        ("[ab]*.jsonl", "[ab]*.jsonl"),
    ):
        assert load(GenerateConfig, [f"dataset.data_files={typed}"]).dataset.data_files == files


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0123456", "int 42798"),
        ("1e10", "float 10000000000.0"),
        ("no", "bool False"),
        ("1:30", "int 90"),
        ("2024-01-01", "date 2024-01-01"),
        ("12", "int 12"),
    ],
)
def test_a_yaml_file_quotes_text_that_looks_like_something_else(text: str, meaning: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for name, content in (
        ("teacher.revision", "teacher: {{revision: {}}}"),
        ("dataset.data_files", "dataset: {{data_files: [a, {}]}}"),
    ):
        file.write_text(content.format(text))
        with pytest.raises(
            ConfigError, match=f"{name}: expected text.*, found {text}, which YAML takes for"
        ) as refused:
            load(GenerateConfig, [str(file)])
        assert str(refused.value).startswith(f"{file}: ")
        assert f"the {meaning}: quote it, '{text}'" in str(refused.value)
        assert "\n" not in str(refused.value)
        file.write_text(content.format(f"'{text}'"))
        assert text in str(load(GenerateConfig, [str(file)]))


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-.inf", "1e999", "1_000", "0x10", "010", "1:30", "ten"])
def test_numbers_are_plain_decimals(text: str, tmp_path: Path) -> None:
    """For each key that is a number, typed or in a file; lists of them too."""
    file = tmp_path / "x.yaml"
    for kind, name, value in (
        (GenerateConfig, "capture.k", text),
        (GenerateConfig, "dataset.max_samples", text),
        (GenerateConfig, "capture.temperatures", f"[1.0,{text}]"),
        (TrainConfig, "optimizer.learning_rate", text),
        (TrainConfig, "loss.temperature", text),
    ):
        section, _, rest = name.partition(".")
        file.write_text(f"{section}: {{{rest}: {value}}}")
        for argument in (f"{name}={value}", str(file)):
            with pytest.raises(ConfigError, match=f"{name}: expected "):
                load(kind, [argument])
    with pytest.raises(ConfigError, match="expected auto or at least 1"):
        load(GenerateConfig, [f"store.block_rows={text}"])


def test_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("optimizer: {learning_rate: 3e-4, clip: .5, weight_decay: 1.0e-1}")
    rates = {"3e-4": 3e-4, "1": 1.0, "2.50": 2.5, "1E-3": 1e-3}
    for text, rate in rates.items():
        assert load(TrainConfig, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == rate
    found = load(TrainConfig, [str(tmp_path / "x.yaml")]).optimizer
    assert (found.learning_rate, found.clip, found.weight_decay) == (3e-4, 0.5, 0.1)
    config = load(GenerateConfig, ["capture.method=topk", "capture.temperatures=[1.0,3e-1]", "dataset.streaming=true"])
    assert config.capture.temperatures == [1.0, 0.3]
    assert config.dataset.streaming is True
    for text in ("1e4", "8.0", "+8", "8 "):
        with pytest.raises(ConfigError, match=r"capture.k: expected an integer"):
            load(GenerateConfig, [f"capture.k={text}"])


def test_options_of_the_object_store(tmp_path: Path) -> None:
    """What obstore takes: text for its own settings; below them booleans and numbers, as it wants them."""
    store = pytest.importorskip("obstore").store
    file = tmp_path / "keys.yaml"
    file.write_text("store: {options: {access_key_id: '012345', secret_access_key: 'no'}}")
    typed = ["virtual_hosted_style_request=false", "skip_signature=true"]
    typed += ["client_options.allow_http=true", "client_options.timeout=5s", "retry_config.max_retries=5"]
    config = load(GenerateConfig, [str(file), *(f"store.options.{option}" for option in typed)])
    assert config.store.options == {
        "access_key_id": "012345",
        "secret_access_key": "no",
        "virtual_hosted_style_request": "false",
        "skip_signature": "true",
        "client_options": {"allow_http": True, "timeout": "5s"},
        "retry_config": {"max_retries": 5},
    }
    store.from_url("s3://bucket/x.zarr", **config.store.options)


def test_a_file_in_a_folder_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2").mkdir()
    (tmp_path / "lr=2" / "x.yaml").write_text("capture: {k: 8}")
    (tmp_path / "k=1.yml").write_text("capture: {k: 7}")
    for name, k in (("lr=2/x.yaml", 8), (f"{tmp_path}/lr=2/x.yaml", 8), ("k=1.yml", 7)):
        assert load(GenerateConfig, [name]).capture.k == k
    assert load(GenerateConfig, ["dataset.path=lr=2/x.yaml"]).dataset.path == "lr=2/x.yaml"
    assert load(GenerateConfig, [f"store.path={'x' * 5000}"]).store.path == "x" * 5000


def test_a_tilde_is_the_home_folder_for_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["teacher.model", "dataset.path", "dataset.data_files", "store.path", "log_dir"]
    (tmp_path / "x.yaml").write_text("dataset: {data_files: [~/a, ~/b]}")
    config = load(GenerateConfig, [f"{name}=~/x" for name in names])
    assert [
        config.teacher.model,
        config.dataset.path,
        config.dataset.data_files,
        config.store.path,
        config.log_dir,
    ] == [f"{tmp_path}/x"] * 5
    assert load(GenerateConfig, ["~/x.yaml"]).dataset.data_files == [f"{tmp_path}/a", f"{tmp_path}/b"]
    trained = load(TrainConfig, ["output=~", "student.model=~/x", "store.path=~/x", "log_dir=~/x/~"])
    assert (trained.output, trained.student.model) == (str(tmp_path), f"{tmp_path}/x")
    assert (trained.store.path, trained.log_dir) == (f"{tmp_path}/x", f"{tmp_path}/x/~")
    assert load(TrainConfig, ["output=~root/x"]).output == str(Path("~root/x").expanduser())
    for plain in ("s3://bucket/~/x", "a~b", "org/model~1"):
        assert load(GenerateConfig, [f"teacher.model={plain}"]).teacher.model == plain
    monkeypatch.setenv("HOME", "/")
    assert load(TrainConfig, ["output=~/x"]).output == "/x"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a user of a container, whom nobody knows
    with pytest.raises(ConfigError, match=r"output: expected a home folder for ~, found none \(in ~/x\)"):
        load(TrainConfig, ["output=~/x"])


@pytest.mark.parametrize("kind", [GenerateConfig, TrainConfig, RolloutConfig, ExportConfig, IngestConfig])
def test_a_folder_that_is_written_is_no_url(kind: type, tmp_path: Path) -> None:
    """All but stores, which a bucket may hold."""
    for name in {"output", "log_dir"} & {name for name, _ in _leaves(kind)}:
        with pytest.raises(ConfigError, match=f"^{name}: expected a local folder, found the URL s3://b/x$"):
            load(kind, [f"{name}=s3://b/x"])
        (tmp_path / "config.yaml").write_text(f"{name}: https://h/x")
        with pytest.raises(ConfigError, match=f"yaml: {name}: expected a local folder, found the URL https://h/x$"):
            load(kind, [str(tmp_path / "config.yaml")])
        assert getattr(load(kind, [f"{name}=s3:/b"]), name) == "s3:/b"


def test_every_key_that_names_files_is_a_path() -> None:
    for kind in (GenerateConfig, TrainConfig):
        for name, leaf in _leaves(kind):
            assert leaf.metadata["path"] == bool(re.search(r"\b(folder|file)\b", leaf.metadata["help"])), name
    package = Path(__file__).parent.parent / "distill"
    assert [file.name for file in package.rglob("*.py") if "expanduser" in file.read_text()] == ["settings.py"]
