"""A lease keeps a second run out, ends with its run, and is taken from a dead one by one taker only."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore import exceptions

from distill.errors import StorageError, StoreError
from distill.store import lease
from distill.store.store import Store
from distill.store.writable import WritableStore
from tests.store.seaweedfs import Server
from tests.store.test_store import commit_all, create, fill

DEAD = {"run": "another", "renewed": 5, "boot": "another machine's", "pids": "pid:[1]", "pid": 1, "started": "1"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 0.3)
    monkeypatch.setattr(lease, "_DEAD_SECONDS", 1.5)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)


def made(server: Server, name: str, **options: Any) -> WritableStore:
    store: WritableStore = create(f"s3://bucket/{name}", options={**server.options, **options})
    return store


def opened(server: Server, name: str) -> WritableStore:
    store = WritableStore.open(f"s3://bucket/{name}", server.options)
    assert store is not None
    return store


def there(server: Server, name: str) -> set[str]:
    return {found["path"] for batch in obstore.list(server.bucket(name)) for found in batch}


def release(store: WritableStore) -> None:
    assert store._lock is not None
    store._lock.release()


@pytest.mark.usefixtures("quick")
def test_a_second_run_is_refused_until_the_first_ends(s3: Server) -> None:
    first, second = made(s3, "refused.zarr"), opened(s3, "refused.zarr")
    with pytest.raises(StoreError, match=r"another run is writing s3://bucket/refused.zarr; wait for it, or stop it"):
        second.lock()
    assert "lease.json" in there(s3, "refused.zarr")
    assert Store.existing("s3://bucket/refused.zarr", s3.options).array_names() == first.array_names()
    release(first)
    assert "lease.json" not in there(s3, "refused.zarr")
    second.lock()
    commit_all(second)
    second.mark_complete()
    assert "lease.json" not in there(s3, "refused.zarr")


@pytest.mark.usefixtures("quick")
def test_a_lease_alone_is_nothing(s3: Server) -> None:
    """Of a run that was killed before it wrote anything else: its place is free, not foreign."""
    obstore.put(s3.bucket("alone.zarr"), "lease.json", json.dumps(DEAD).encode())
    assert Store.open("s3://bucket/alone.zarr", s3.options) is None
    made(s3, "alone.zarr")


@pytest.mark.usefixtures("quick")
def test_one_of_several_takes_over(s3: Server, caplog: pytest.LogCaptureFixture) -> None:
    release(made(s3, "taken.zarr"))
    obstore.put(s3.bucket("taken.zarr"), "lease.json", json.dumps(DEAD).encode())
    stores = [opened(s3, "taken.zarr") for _ in range(4)]
    refused: list[Exception] = []

    def take(store: WritableStore) -> None:
        try:
            store.lock()
        except StoreError as error:
            refused.append(error)

    began = time.monotonic()
    takers = [threading.Thread(target=take, args=[store]) for store in stores]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert time.monotonic() - began >= 1.5
    assert len(refused) == 3
    assert all("another run is writing" in str(error) for error in refused)


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(s3: Server) -> None:
    release(made(s3, "gone.zarr"))
    gone = {**lease._this_process(), "run": "another", "started": "1"}  # its number was given to another since
    obstore.put(s3.bucket("gone.zarr"), "lease.json", json.dumps(gone).encode())
    began = time.monotonic()
    opened(s3, "gone.zarr").lock()
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("quick")
def test_who_has_lost_it_writes_no_more(s3: Server) -> None:
    """As after its machine stood still for long: another run has taken over, and this one ends."""
    store = made(s3, "lost.zarr")
    obstore.put(s3.bucket("lost.zarr"), "lease.json", json.dumps(DEAD).encode())
    time.sleep(1)
    with pytest.raises(StorageError, match=r"another run is writing s3://bucket/lost.zarr"):
        fill(store, 0)
    assert opened(s3, "lost.zarr").missing_blocks() == [0, 1, 2]
    release(store)
    assert json.loads(bytes(obstore.get(s3.bucket("lost.zarr"), "lease.json").bytes())) == DEAD, "not ours to delete"


class Refusing:
    """A client whose server refuses each update, and answers a read as it is told."""

    def __init__(self, answer: Exception) -> None:
        self._answer = answer

    def put(self, *_: Any, **__: Any) -> Any:
        raise exceptions.PreconditionError("412")

    def get(self, *_: Any) -> Any:
        raise self._answer


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answer", ["gone", "no answer"])
def test_a_refused_renewal_is_looked_into(answer: str, s3: Server) -> None:
    """Gone: another run had it, and has ended. No answer: this one goes on asking, and does not forget."""
    store = made(s3, f"renewal {answer}.zarr")
    release(store)
    holder = lease._Holder(store.location)
    holder._obstore = Refusing(FileNotFoundError("404") if answer == "gone" else exceptions.GenericError("no answer"))
    thread = threading.Thread(target=holder.keep, daemon=True)
    thread.start()
    time.sleep(1)
    if answer == "gone":
        with pytest.raises(StorageError, match="another run is writing"):
            holder.check()
    else:
        holder.check()
        assert thread.is_alive()
        holder._obstore = Refusing(FileNotFoundError("404"))
        thread.join(5)
        with pytest.raises(StorageError, match="another run is writing"):
            holder.check()


@pytest.mark.parametrize("server", ["says that it has none", "ignores them", "ignores those of updates"])
def test_without_conditional_writes_there_is_a_warning(
    server: str, s3: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put: Callable[..., Any] = obstore.put_async
    ignored = {"ignores them": (str, dict), "ignores those of updates": (dict,)}.get(server, ())
    monkeypatch.setattr(
        "obstore.put_async",
        lambda *args, mode="overwrite": put(*args, mode="overwrite" if isinstance(mode, ignored) else mode),
    )
    options = {"conditional_put": "disabled"} if server == "says that it has none" else {}
    with caplog.at_level(logging.WARNING):
        store = made(s3, f"{len(server)}.zarr", **options)
    assert [record.message.partition("has ")[2] for record in caplog.records] == [
        "no conditional writes: a second run on it is not refused; start only one"
    ]
    assert "lease.json" not in there(s3, f"{len(server)}.zarr")
    commit_all(store)
    assert store.missing_blocks() == []


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    here = lease._this_process()
    assert not lease._is_gone(here)
    assert lease._is_gone({**here, "started": "1"})
    assert lease._is_gone({**here, "pid": 2**22 + 1})
    assert not lease._is_gone({**here, "pid": 2**22 + 1, "boot": "another machine's"})
    assert not lease._is_gone({**here, "pid": 2**22 + 1, "pids": "another container's"})
    assert not lease._is_gone({})
    assert Path(f"/proc/{here['pid']}").is_dir()
