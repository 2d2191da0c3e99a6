"""Stores read by their web address, from servers of all kinds: the values of the folder, or one line."""

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import TeacherCache, inspect, verify
from distill.errors import StorageError, StoreError
from distill.store import retry
from distill.store.store import Store
from distill.store.writable import WritableStore
from tests.store.seaweedfs import options_file
from tests.store.test_store import commit_all, create
from tests.store.webserver import CUT, WebServer, serving
from tests.support import environment, generate, reseal

TOKEN = "Bearer hf_made_up_token"
HEADERS = {"client_options": {"default_headers": {"Authorization": TOKEN}}}
ROWS = 7  # arrays over rows: tokens, loss_mask, and five that are captured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with x.zarr: 3 blocks of 32 rows in inner chunks of 8. No token of block 1 is trained on: no chunk."""
    found = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.store.schema.INNER_ROWS", 8)
        store = create(found / "x.zarr", publish=False)
        store.write_rows("loss_mask", 1, np.zeros(20, bool))
        store.publish()
        commit_all(store)
        reseal(found / "x.zarr", num_tokens=60, vocab_size=1000)
        again = WritableStore.existing(str(found / "x.zarr"), {})
        again.mark_complete()
    assert not (found / "x.zarr/loss_mask/c/1").exists()
    return found


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.store.schema.INNER_ROWS", 8)
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "_OPENING_SECONDS", 0.2)


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "mine"))


@contextlib.contextmanager
def behind_redirects(folder: Path) -> Iterator[tuple[WebServer, WebServer]]:
    """A hub that wants a login, and the server that it sends clients to."""
    with serving(WebServer(folder)) as files, serving(WebServer(folder, to=files.url, token=TOKEN)) as hub:
        yield hub, files


def equal(cache: TeacherCache, folder: Path) -> None:
    local = TeacherCache(str(folder / "x.zarr"))
    assert len(cache) == len(local) == 7
    for ours, theirs in zip(cache, local, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_opening_takes_few_requests_and_a_sample_its_own_parts(folder: Path) -> None:
    with serving(WebServer(folder)) as server:
        cache = TeacherCache(f"{server.url}/x.zarr/")
        opened = server.asked[:]
        assert sorted(path for _, path, _ in opened[:2]) == ["/x.zarr/commits/zarr.json", "/x.zarr/zarr.json"]
        assert len(opened) == len({path for _, path, _ in opened}) == 1 + (ROWS + 3 + 3) + 2, "no file twice"
        server.asked.clear()
        sample = cache[3]  # rows 42 to 51: two inner chunks of four
        torch.testing.assert_close(sample, TeacherCache(str(folder / "x.zarr"))[3], rtol=0, atol=0, equal_nan=True)
        ranges = [headers.get("range") for _, path, headers in server.asked]
        assert ranges.count(None) == 3, "commits, checksums and plan_checksums"
        assert {method for method, *_ in opened + server.asked} == {"GET"}
        server.asked.clear()
        assert len(cache[3]["tokens"]) == 10
        assert not server.asked, "its chunks are kept"


@pytest.mark.parametrize(
    "kind", [{}, {"ranges": "plain"}, {"ranges": "none"}, {"absent": 403}, {"failures": [503, CUT, 429]}]
)
def test_every_kind_of_server_gives_the_values_of_the_folder(
    kind: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(WebServer(folder, **kind)) as server:
        cache = TeacherCache(f"{server.url}/x.zarr")
        equal(cache, folder)
        for batch, local in zip(cache.shuffled(2), TeacherCache(str(folder / "x.zarr")).shuffled(2), strict=True):
            assert all(batch[name].equal(local[name]) for name in local)
        assert caplog.text.count("its server sends no parts of files: whole ones are read") == (
            kind.get("ranges") == "none"
        )
        plain = [headers.get("range", "") for _, _, headers in server.asked]
        assert any(each.startswith("bytes=-") for each in plain) or kind.get("ranges", "all") != "all"


def test_redirects_are_followed_and_the_login_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with behind_redirects(folder) as (hub, files):
        given = options_file(tmp_path / "login.yaml", HEADERS)
        assert verify.main([f"{hub.url}/x.zarr", given]) == verify.main([str(folder / "x.zarr")])
        shown = capsys.readouterr()
        assert "committed" in shown.out
        assert TOKEN not in shown.out + shown.err
        equal(TeacherCache(f"{hub.url}/x.zarr", HEADERS), folder)
        assert {headers.get("authorization") for _, _, headers in hub.asked} == {TOKEN}
        assert len(files.asked) == len(hub.asked)
        assert any("range" in headers for _, _, headers in files.asked)
        assert all(path.endswith("?sig=SIGNATURE") for _, path, _ in files.asked)
        assert not any("authorization" in headers for _, _, headers in files.asked), "it is not the hub"
        with pytest.raises(StoreError) as refused:
            TeacherCache(f"{hub.url}/x.zarr")
    assert "access denied; are the credentials right? (401 Unauthorized); is the address right?" in str(refused.value)
    assert "default_headers" in str(refused.value)


@pytest.mark.parametrize("absent", [404, 403, 200])
def test_a_file_that_is_not_there_is_never_data(absent: int, mine: Path) -> None:
    shutil.rmtree(mine / "x.zarr/target_ids/c/1")
    (mine / "x.zarr/commits/c/2").unlink()
    with serving(WebServer(mine, absent=absent)) as server:
        url = f"{server.url}/x.zarr"
        if absent == 200:  # of a loss mask that is not there the server sends a page
            with pytest.raises(StoreError, match=r"damaged: (loss_mask|target_ids), block 1: "):
                TeacherCache(url)[2]
            return
        cache = TeacherCache(url)
        kind, words = {
            404: (
                StoreError,
                "damaged: target_ids of block 1 does not match its checksums; .* it back where it can be written",
            ),
            403: (StorageError, f"^store: cannot read target_ids/c/1/0 in {url}: access denied"),
        }[absent]
        with pytest.raises(kind, match=words):
            cache[2]
        kind, words = (
            (StoreError, "block 2 is not there") if absent == 404 else (StorageError, "cannot read commits/c/2")
        )
        with pytest.raises(kind, match=words):
            cache[6]
        torch.testing.assert_close(cache[0], TeacherCache(str(mine / "x.zarr"))[0], rtol=0, atol=0, equal_nan=True)


def test_a_proxy_of_the_environment_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(WebServer(folder)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        equal(TeacherCache("http://store.invalid/a%20b/../x.zarr"), folder)
        assert all(path.startswith("http://store.invalid/x.zarr/") for _, path, _ in proxy.asked)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("/y.zarr", {}, "store.path: found no store at {}"),
    "a page": ("/tree/main/x.zarr", {"absent": 200},
               "store.path: found a web page and no store at {}; this is the address of a page for people"),
    "no page": ("/u/n/blob/main/x.zarr", {}, "store.path: found no store at {}; this is the address of a page"),
    "forbidden": ("/y.zarr", {"absent": 403}, "cannot use {}: access denied; are the credentials right? (403 "),
    "compressed": ("/x.zarr", {"gzipped": True}, "expected files as they are at {}, found "),
    "a query": ("/x.zarr?token=hf_made_up", {}, "store.path: expected a web address without ? and #, found one after "),
    "a user": ("/x.zarr", {"user": "hf_made_up@"}, "expected a web address without user:password@"),
    "an option": ("/x.zarr", {"options": {"region": "x"}},
                  "store.options: expected client_options or retry_config for {}, found region"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_store_is_refused_in_one_line(name: str, folder: Path) -> None:
    path, kind, words = REFUSED[name]
    user, options = kind.get("user", ""), kind.get("options", {})
    with serving(WebServer(folder, **{key: kind[key] for key in kind.keys() - {"user", "options"}})) as server:
        url = server.url.replace("//", f"//{user}") + path
        with pytest.raises(StoreError) as refused:
            TeacherCache(url, options)
    assert words.format(url) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "made_up" not in str(refused.value)


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    for url, words in (
        ("http://127.0.0.1:9/x.zarr", "connection refused"),
        ("https://nowhere.invalid/x.zarr", "the name of its host is not known"),
    ):
        with pytest.raises(StoreError, match=f"^store.path: cannot use {url}: {words}$"):
            TeacherCache(url)
    with serving(WebServer(tmp_path)) as server:
        server.to = f"{server.url}/again"
        with pytest.raises(StoreError, match=r"cannot use .*: its redirects do not end$"):
            TeacherCache(f"{server.url}/x.zarr")
        secure = server.url.replace("http", "https")
        with pytest.raises(StoreError, match=r"cannot use .*: the endpoint does not speak https$"):
            TeacherCache(f"{secure}/x.zarr")


def test_an_outage_is_waited_for_and_ends_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(WebServer(folder)) as server, caplog.at_level(logging.INFO):
        cache = TeacherCache(f"{server.url}/x.zarr", {"retry_config": {"max_retries": 0}})
        server.failures += [503, CUT, 503, 503]
        assert cache[0]["tokens"].equal(TeacherCache(str(folder / "x.zarr"))[0]["tokens"])
        assert "it answered (503 Service Unavailable); trying again for up to 300 s" in caplog.text
        assert "is back, after" in caplog.text
        monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 0.2)
        server.failures += [429] * 10_000
        with pytest.raises(StorageError, match=r"store: cannot read .*: it answered \(429 Too Many Requests\)"):
            cache[6]


def test_whole_files_are_read_only_where_they_are_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.store.web._LARGEST_WHOLE_BYTES", 100)
    with serving(WebServer(folder, ranges="none")) as server:
        cache = TeacherCache(f"{server.url}/x.zarr")
        with pytest.raises(StoreError, match=r"expected a server that sends parts of files \(range requests\) at http"):
            cache[0]


def test_only_a_complete_store_is_read(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WritableStore.existing(str(mine / "x.zarr"), {}).reopen()
    with serving(WebServer(mine)) as server:
        url = f"{server.url}/x.zarr"
        for unfinished in (False, True):
            with pytest.raises(StoreError, match="is unfinished, and a web server does not list what is there"):
                TeacherCache(url, allow_unfinished=unfinished)
        assert inspect.main([url]) == verify.main([url]) == 2
        assert capsys.readouterr().err.count("is unfinished, and a web server does not list") == 2
        shutil.rmtree(mine / "x.zarr/commits")
        with pytest.raises(StoreError, match=r"store\.path: found no store at http"):
            TeacherCache(url)


def test_verify_finds_over_the_web_what_it_finds_in_a_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(path: str) -> tuple[int, str]:
        return verify.main([path]), capsys.readouterr().out.replace(path, "STORE")

    with serving(WebServer(mine)) as server:
        url, local = f"{server.url}/x.zarr", str(mine / "x.zarr")
        (status, found), (local_status, local_found) = said(url), said(local)
        assert status == local_status
        assert found.splitlines()[:-1] == local_found.splitlines()[:-1]
        assert found.endswith("it can be repaired where it is kept\n") == (status == 1)  # its rows are made up
        assert local_found.endswith("distill.generate makes it again\n") == (status == 1)
        shutil.copy(mine / "x.zarr/target_ids/c/0/0", mine / "x.zarr/target_ids/c/2/0")
        shutil.copy(mine / "x.zarr/tokens/c/0", mine / "x.zarr/tokens/c/1")
        (mine / "x.zarr/next_logprob/c/2").unlink()
        (mine / "x.zarr/commits/c/1").unlink()
        status, found = said(url)
        assert status == 1
        for words in (
            "tokens of block 1 does",
            "target_ids of block 2 does",
            "next_logprob of block 2",
            "block 1: its commit is missing",
        ):
            assert words in found
        assert {line for line in said(local)[1].splitlines() if line.startswith("  ")} <= {*found.splitlines()}
        server.asked.clear()
        assert verify.main([url, "--repair"]) == 2
        assert (
            capsys.readouterr().err
            == f"error: store.path: cannot write {url}: what is on a web server can only be read\n"
        )
        assert not server.asked


def test_inspect_measures_a_store_that_has_few_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = Store.existing(str(folder / "x.zarr"), {})
    for kind in ({}, {"ranges": "none"}, {"absent": 403}):
        with serving(WebServer(folder, **kind)) as server:
            store = Store.existing(f"{server.url}/x.zarr", {})
            assert [store.describe(name) for name in store.array_names()] == [
                local.describe(name) for name in local.array_names()
            ]
    with serving(WebServer(folder)) as server:
        monkeypatch.setattr("distill.store.store._MEASURED_FILES", 10)
        store = Store.existing(f"{server.url}/x.zarr", {})
        server.asked.clear()
        assert store.describe("tokens") == ((96,), "int32", None)
        assert not server.asked


def test_nothing_is_written_to_a_web_address(folder: Path, tmp_path: Path) -> None:
    with serving(WebServer(folder)) as server:
        url = f"{server.url}/x.zarr"
        ran = generate(tmp_path, f"store.path={url}", "teacher.model=./nowhere")
        assert ran.returncode == 2
        assert ran.stderr == (
            f"error: store.path: expected a folder or a bucket (s3://bucket/name) to write, found {url}: what is on a "
            "web server can only be read\n"
        )
        with pytest.raises(StoreError, match="what is on a web server can only be read"):
            WritableStore.open(url, {})
        assert not server.asked
    assert not list(tmp_path.iterdir()), "before any work"


@pytest.mark.timeout(600)
def test_a_run_is_continued_from_a_web_address(small_store: Path, tmp_path: Path) -> None:
    """With a reader of its own process: what was begun with the folder goes on, with the losses of the folder."""

    def train(path: str, output: Path, *more: str) -> list[dict[str, Any]]:
        arguments = [f"store.path={path}", "student.layers=1", "batch.samples=2", "optimizer.steps=6", *more]
        arguments += ["evaluation.samples=8", "batch.window_blocks=1", "checkpoint_every=3", "device=cpu"]
        ran = subprocess.run(
            [sys.executable, "-m", "distill.train", *arguments, "batch.readers=1", f"output={output}"], cwd=tmp_path,
            env=environment(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    expected = train(str(small_store), tmp_path / "folder")
    half = Path(shutil.copytree(tmp_path / "folder", tmp_path / "half"))
    shutil.rmtree(half / "checkpoints/step_6")
    (half / "model.safetensors").unlink()
    with serving(WebServer(small_store.parent, failures=[503])) as server:
        assert train(f"{server.url}/{small_store.name}", half) == expected
        assert {method for method, *_ in server.asked} == {"GET"}
    assert (half / "model.safetensors").read_bytes() == (tmp_path / "folder/model.safetensors").read_bytes()
