import pytest

from distill.config import GenerateConfig
from distill.errors import ConfigError
from distill.settings import help_text, load, to_yaml


def test_later_wins(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("capture: {k: 8}\nbatch: {max_tokens: 100}\n")
    second.write_text("capture: {k: 9}\n")
    config = load(GenerateConfig, ["batch.max_tokens=300", str(first), str(second)])
    assert (config.capture.k, config.batch.max_tokens, config.capture.seed) == (9, 300, 0)
    assert load(GenerateConfig, []) == GenerateConfig()


def test_the_resolved_config_reads_back(tmp_path):
    config = load(GenerateConfig, ["capture.temperatures=[1.0, 4]", "store.options.region=eu", "dataset.name='0012'"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(GenerateConfig, [str(tmp_path / "config.yaml")]) == config
    assert config.capture.temperatures == [1.0, 4.0]
    assert config.store.options == {"region": "eu"}
    assert config.dataset.name == "0012"


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
        ("capture.temperatures=[1.0,hot]", r"capture.temperatures: expected a list of a number, found \[1.0, 'hot'\]"),
        ("dataset.max_length=1", "dataset.max_length: expected auto or at least 2"),
        ("dataset.data_files={a: 1}", "dataset.data_files: expected a file or a list of files"),
        ("dataset.data_files=0", "dataset.data_files: expected a file or a list of files, found 0"),
        ("dataset.long=wrap", "dataset.long: expected split, truncate, drop, found 'wrap'"),
        ("store.block_rows=0", "store.block_rows: expected auto or at least 1, found 0"),
        ("parallel.shard_size=half", "parallel.shard_size: expected auto or at least 1, found 'half'"),
        ("store.path=[1", "not YAML"),
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
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load(GenerateConfig, [str(bad)])


def test_help_lists_every_key_with_its_default():
    text = help_text(GenerateConfig, "x")
    for words in ("capture.k=64", "dataset.max_length=auto", "store.path=outputs/demo.zarr", "teacher.revision=null"):
        assert words in text
