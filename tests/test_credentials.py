"""No credential is in a file, a log, an error, a store or a command line."""

import contextlib
import json
import logging
import pickle
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import TeacherCache, credentials, inspect
from distill.config.generate import GenerateConfig, StoreConfig
from distill.config.train import TrainConfig
from distill.credentials import HIDDEN, hide, is_credential, keep_secret
from distill.errors import ConfigError, DistillError, PeerError, StoreError, UserError, first_line
from distill.run import log
from distill.settings import flat, load, secret_digests, to_yaml
from distill.store.store import Store
from tests.processes import children
from tests.run.test_nodes import both
from tests.support import build_model, command, environment, generate, make_tokenizer

SECRET, TOKEN = "mArKeD/sEcReT+1", "mArKeDtOkEn=="
OPTIONS: dict[str, Any] = {
    "access_key_id": "MARKEDKEYID",
    "secret_access_key": SECRET,
    "session_token": TOKEN,
    "region": "eu-west-7",
    "endpoint": "http://127.0.0.1:9",
    "client_options": {"default_headers": {"x-pass": "mArKeDhEaDeR"}, "proxy_url": "http://me:mArKeDpRoXy@127.0.0.1:9"},
}
MARK = re.compile("marked(?!_)", re.IGNORECASE)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    before = set(credentials._kept)
    yield
    credentials._kept.clear()
    credentials._kept.update(before)


def config_file(folder: Path, options: Any = OPTIONS, **others: Any) -> Path:
    file = folder / "keys.yaml"
    file.write_text(json.dumps({"store": {"options": options}, **others}))
    return file


@pytest.mark.parametrize("kind", [GenerateConfig, TrainConfig])
def test_a_configuration_shows_no_option(kind: Any, tmp_path: Path) -> None:
    config = load(kind, [str(config_file(tmp_path)), "store.path=s3://bucket/x.zarr", "timeout_seconds=7"])
    assert config.store.options == OPTIONS
    shown = to_yaml(config)
    for text in (shown, repr(config), str(config), repr(config.store), json.dumps(flat(config)), f"{[config]}"):
        assert not MARK.search(text), text
        assert "s3://bucket/x.zarr" in text
    first = shown.splitlines()[0]
    assert first.startswith("# store.options is left out, as its values may be credentials: ")
    assert '"client_options.default_headers.x-pass"' in first
    (tmp_path / "config.yaml").write_text(shown)
    again = load(kind, [str(tmp_path / "config.yaml")])
    assert (again.store.path, again.timeout_seconds, again.store.options) == ("s3://bucket/x.zarr", 7, {})
    assert load(kind, [str(tmp_path / "config.yaml"), str(tmp_path / "keys.yaml")]) == config
    assert not to_yaml(kind()).startswith("#")


def test_digests_differ_where_values_do() -> None:
    given: list[dict[str, Any]] = [{"region": "a", "client_options": {"x": x}} for x in ("1", "2")]
    one, other = (StoreConfig(options=options) for options in given)
    configs = [GenerateConfig(store=store) for store in (one, other)]
    first, second = (secret_digests(config, "salt") for config in configs)
    assert first.keys() == second.keys() == {"store.options.region", "store.options.client_options.x"}
    assert [name for name in first if first[name] != second[name]] == ["store.options.client_options.x"]
    assert set(first.values()).isdisjoint(secret_digests(configs[0], "other").values())


def test_nodes_compare_options_and_do_not_show_them() -> None:
    mine, other = ({**OPTIONS, "secret_access_key": key} for key in (SECRET, f"{SECRET}2"))
    del other["region"]
    configs = [GenerateConfig(store=StoreConfig(options=options)) for options in (mine, other)]
    both([configs[0], configs[0]], "s3://bucket/x")
    with pytest.raises(UserError) as refused:
        both(configs, "s3://bucket/x")
    assert "store.options.secret_access_key: worker 0 has another value than this node" in str(refused.value)
    assert "store.options.region: worker 0 has" in str(refused.value)
    assert "session_token" not in str(refused.value)
    assert not MARK.search(str(refused.value))


@pytest.mark.parametrize(
    "content",
    [
        "store: {options: {key: 8675309}}",
        "store: {options: {key: [8675309]}}",
        "store: {options: 8675309}",
        "store: {options: {client_options: {x: 8675309_0}}}",
        "store: {options: [8675309]}",
        "store: 8675309",
        "store: {options: {key: *8675309}}",
        "store: {options: {key: !8675309 x}}",
        "store: {options: {key: &8675309 x, a: &8675309 y}}",
        "store: {options: {key: '8675309}}",
        "store: {options: {key: `8675309}}",
        "store: {options: {key: 8675309: 1}}\n8675309",
    ],
)
def test_what_is_wrong_in_a_file_is_not_shown(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.yaml: ") as refused:
        load(GenerateConfig, [str(tmp_path / "x.yaml")])
    error: BaseException | None = refused.value
    assert "8675309" not in str(error)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize(
    "argument",
    [
        *(f"store.options.{name}=mArKeD" for name in ("access_key_id", "aws_secret_access_key", "AWS_SESSION_TOKEN")),
        *(
            f"store.options.{name}=mArKeD"
            for name in ("sas_key", "account_key", "client_secret", "my_password", "token")
        ),
        "store.options.client_options.default_headers.x=mArKeD",
        "store.options.client_options.proxy_url=http://proxy:1",
        "store.options={region: eu, secret_access_key: mArKeD}",
        "store.options.client_options={default_headers: {a: mArKeD}}",
        "store.options.endpoint=http://user:mArKeD@host",
        "store.path=s3://user:mArKeD@bucket/x",
        "dataset.data_files=[https://user:mArKeD@host/x.jsonl]",
        "store.options.secret_access_key=[mArKeD",
    ],
)
def test_a_command_line_has_no_credential(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (GenerateConfig,) if argument.startswith("dataset") else (GenerateConfig, TrainConfig)
    for kind in kinds:
        with pytest.raises(ConfigError) as refused:
            load(kind, [argument])
        assert "mArKeD" not in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "AWS_SECRET_ACCESS_KEY" in str(refused.value)
        assert "YAML file" in str(refused.value)
    if argument.startswith("store.options"):
        assert inspect.main(["x.zarr", argument]) == 2
        assert "mArKeD" not in "".join(capsys.readouterr())


def test_harmless_options_may_be_typed() -> None:
    typed = "region=eu endpoint=http://h:9 allow_http=true skip_signature=true virtual_hosted_style_request=false"
    typed += " web_identity_token_file=/x sse_kms_key_id=y client_options.timeout=5s authority_host=z"
    assert len(load(GenerateConfig, [f"store.options.{option}" for option in typed.split()]).store.options) == 9
    assert not is_credential("conditional_put", "etag")


def test_a_path_has_no_password() -> None:
    with pytest.raises(ConfigError, match=r"store.path: expected a URL without user:password@, found one") as refused:
        TeacherCache("s3://user:mArKeD@bucket/x")
    assert "mArKeD" not in str(refused.value)
    assert inspect.main(["s3://user:mArKeD@bucket/x"]) == 2


def test_every_form_of_a_secret_is_hidden() -> None:
    keep_secret({**OPTIONS, "service_account_key": '{"private_key": "line one marked\\nline two marked"}'})
    texts = [SECRET, f"a={SECRET}&b", "mArKeD%2FsEcReT%2B1", "mArKeD/sEcReT%2B1", repr(SECRET), json.dumps(OPTIONS)]
    texts += [f"key MARKEDKEYID {TOKEN}", "line two marked", repr(OPTIONS), "http://me:mArKeDpRoXy@127.0.0.1:9/x"]
    for text in texts:
        assert not MARK.search(hide(text)), hide(text)
        assert HIDDEN in hide(text)
    for text in ("eu-west-7", "http://127.0.0.1:9/bucket/x", "s3://bucket/a:b@c", "true", "", "12:30 a@b.c"):
        assert hide(text) == text


def test_what_servers_repeat_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the client had it from a file or a metadata service, and nobody told us."""
    answer = (
        "<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>mArKeD</AWSAccessKeyId><StringToSign>AWS4\nmArKeD"
        "</StringToSign><SignatureProvided>mArKeD</SignatureProvided><Token-0>mArKeD</Token-0></Error>"
    )
    assert not MARK.search(hide(answer))
    assert "<Code>SignatureDoesNotMatch</Code>" in hide(answer)
    for text in (
        "GET https://b/x?list&X-Amz-Credential=mArKeD%2F&X-Amz-Signature=mArKeD&X-Amz-Security-Token=mArKeD end",
        "https://a.blob.core.windows.net/c?sv=1&sig=mArKeD",
        "AWS4-HMAC-SHA256 Credential=mArKeD/2026, SignedHeaders=host, Signature=mArKeD",
        "proxy http://u:mArKeD@h",
    ):
        assert not MARK.search(hide(text)), hide(text)
    for name in ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING", "HF_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "mArKeD")
        assert hide("x mArKeD y") == f"x {HIDDEN} y"
        monkeypatch.delenv(name)


def test_errors_have_no_credential() -> None:
    keep_secret(OPTIONS)
    for kind in (DistillError, UserError, StoreError):
        error = kind(f"found {SECRET}")
        assert str(error) == f"found {HIDDEN}"
        assert "mArKeD" not in repr(error)
        assert "mArKeD" not in repr(pickle.loads(pickle.dumps(error)))
    assert str(PeerError(TOKEN, [1])) == HIDDEN
    cause = RuntimeError(f"{SECRET} is wrong\nmore: {TOKEN}")
    assert first_line(cause) == f"{HIDDEN} is wrong"
    assert not MARK.search(repr(cause))


def test_an_object_stores_errors_have_no_credential(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("obstore")
    options: dict[str, Any] = {
        **OPTIONS,
        "endpoint": "http://me:mArKeDpAsS@127.0.0.1:9",
        "retry_config": {"max_retries": 0},
    }
    options["client_options"] = {"allow_http": True}
    wrong = {"virtual_hosted_style_request": "mArKeDsEcReT"}
    for given in (options, {**options, **wrong}, {**options, "unknown": SECRET}, {"client_options": SECRET}):
        with pytest.raises(DistillError) as refused:
            Store.open("s3://bucket/x", given)
        text = "".join(traceback.format_exception(refused.value))
        assert not MARK.search(str(refused.value)), str(refused.value)
        assert not re.search("marked", re.sub(r"^    .*\n", "", text, flags=re.M), re.I), text


def test_logs_have_no_credential(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_secret(OPTIONS)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # so that what follows is taken back
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    log.adapt_to_machine()
    log.adapt_to_machine()
    file = log._LogFile(tmp_path / "worker_1.log", lambda: None)
    file.setFormatter(log._Formatter("%(message)s"))
    try:
        raise RuntimeError(f"with {SECRET}")
    except RuntimeError:
        record = logging.makeLogRecord({"name": "distill", "levelno": 40, "msg": "key %s", "args": (TOKEN,)})
        record.exc_info = sys.exc_info()
    file.emit(record)
    log._Console().emit(record)
    file.close()
    print(f"printed {SECRET}")
    print(f"printed {TOKEN}", file=sys.stderr, flush=True)
    written = (tmp_path / "worker_1.log").read_text()
    assert "RuntimeError: with (hidden)" in written
    shown = capsys.readouterr()
    for text in (written, shown.out, shown.err):
        assert HIDDEN in text
        assert not MARK.search(text), text
    assert sys.stdout.isatty() is False


FAILING = f"""
import sys, threading
from distill.config.generate import GenerateConfig
from distill.credentials import keep_secret
from distill.run.session import run_worker

def body(config, grid, session):
    keep_secret(config.store.options)
    if "open" in sys.argv:
        session.open("logs", "worker_0.log")
    thread = threading.Thread(target=lambda: 1 / len("{SECRET}"[99:]) or print("{SECRET}"), name="x")
    thread.run = lambda: (_ for _ in ()).throw(ValueError("in a thread: {SECRET}"))
    thread.start(); thread.join()
    print("{SECRET}")
    raise RuntimeError("{SECRET} and {TOKEN}")

status = run_worker(GenerateConfig, "x", ["keys.yaml"], body)
assert status == 1
raise RuntimeError("at the end {SECRET}")
"""


@pytest.mark.parametrize("opened", ["open", "closed"])
def test_a_failing_worker_shows_no_credential(opened: str, tmp_path: Path) -> None:
    config_file(tmp_path)
    report = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "report.json")} if opened == "open" else {}
    ran = subprocess.run(
        [sys.executable, "-c", FAILING, opened], cwd=tmp_path, env={**environment(), **report}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "in a thread: (hidden)" in ran.stderr
    assert "at the end (hidden)" in ran.stderr
    (tmp_path / "keys.yaml").unlink()
    # Source lines of `-c` are not in a traceback; what is left is what the program wrote.
    assert not MARK.search(ran.stderr + ran.stdout), ran.stderr
    if opened == "open":
        assert "RuntimeError: (hidden) and (hidden)" in (tmp_path / "report.json").read_text()
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or not MARK.search(file.read_text()), file


VARIABLES = {"AWS_SECRET_ACCESS_KEY": "mArKeD-environment", "HF_TOKEN": "mArKeD-hub"}


def watched(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a command to its end; its status, and all that it and its processes have shown: console and command lines."""
    shown = set()
    with (folder / "console").open("w+") as console:
        launcher = subprocess.Popen(
            arguments, cwd=folder, env={**environment(), **VARIABLES}, stdout=console, stderr=console
        )
        while launcher.poll() is None:
            for pid in below(launcher.pid):
                with contextlib.suppress(OSError):
                    shown.add(Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/comm").read_text())
            time.sleep(0.1)
        console.seek(0)
        return launcher.returncode, console.read() + "\n".join(shown)


def below(pid: int) -> list[int]:
    return [pid, *(deeper for child in children(pid) for deeper in below(child))]


def test_runs_leave_no_credential(texts: Callable[[int], Path], tmp_path: Path) -> None:
    """generate, train and a run with a failing worker, of two workers each; and an object store that is not there."""
    model, tokenizer = build_model("llama"), make_tokenizer()
    model.save_pretrained(tmp_path / "good")
    tokenizer.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("!")["input_ids"][0]] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    tokenizer.save_pretrained(tmp_path / "bad")
    rows = [{"text": "abcde" * 20 + ("!" if i == 17 else ".")} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config_file(tmp_path, dataset={"path": str(texts(40))}, capture={"k": 8}, teacher={"model": "good"})
    (tmp_path / "train.yaml").write_text(json.dumps({"store": {"options": OPTIONS}}))
    common = ["keys.yaml", "log_dir=logs"]
    bad = ["teacher.model=bad", "dataset.path=x.jsonl", "store.block_rows=128", "store.path=bad.zarr"]
    status, shown = watched(command(2, [*common, "store.path=x.zarr"]), tmp_path)
    assert status == 0, shown
    assert "keys.yaml" in shown
    student = ["train.yaml", "store.path=x.zarr", "student.layers=1", "optimizer.steps=2", "evaluation.samples=4"]
    launcher = ["distill.train" if word == "distill.generate" else word for word in command(2, student)]
    consoles = [shown]
    for arguments, expected, said in (
        (launcher, 0, "2 worker(s), ddp"),
        (command(2, [*common, *bad]), 1, "NumericalError"),
    ):
        status, shown = watched(arguments, tmp_path)
        assert status == expected, shown
        assert said in shown
        consoles.append(shown)
    gone: dict[str, Any] = {**OPTIONS, "endpoint": "http://me:mArKeDpAsS@127.0.0.1:9"}
    gone |= {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    config_file(tmp_path, gone, dataset={"path": str(texts(40))}, capture={"k": 8}, teacher={"model": "good"})
    ran = generate(tmp_path, "keys.yaml", "store.path=s3://bucket/x.zarr", workers=None, timeout=240, **VARIABLES)
    assert ran.returncode != 0
    assert "error: store.path: cannot use s3://bucket/x.zarr: " in ran.stderr
    consoles.append(ran.stderr + ran.stdout)
    plan = generate(tmp_path, "--plan", "keys.yaml", "store.path=other.zarr", workers=None, timeout=240, **VARIABLES)
    assert "next" in plan.stdout
    consoles.append(plan.stderr + plan.stdout)
    for console in consoles:
        assert not MARK.search(console), console
    for file in (
        file for file in tmp_path.rglob("*") if file.is_file() and file.name not in ("keys.yaml", "train.yaml")
    ):
        assert b"marked" not in file.read_bytes().lower(), file
    assert "store.options is left out" in (tmp_path / "logs" / "config.yaml").read_text()
    assert "store.options is left out" in (tmp_path / "outputs" / "student" / "config.yaml").read_text()
