"""Seconds and round trips to read a store behind a slow link: an S3 server on loopback, behind a proxy that delays.

    python -m tests.benchmarks.latency [milliseconds=50]

What either side says arrives half a round trip later; how much it says does not matter. The store has half a million
made-up tokens (tests.benchmarks.read), in blocks of 65,536 rows and in a block of 2^20. Each step twice: without a
delay and with it; the round trips are the difference divided by the delay.
"""

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill import TeacherCache
from distill.store.store import Store
from tests.benchmarks.read import write_store
from tests.store.seaweedfs import Server


class Link(threading.Thread):
    """A proxy of a port on loopback; `seconds` are a round trip."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target, self.seconds, self.port = target, 0.0, 0
        self._ready = threading.Event()
        self.start()
        self._ready.wait()

    def run(self) -> None:
        """Serve for as long as the process lives."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while (found := await said.get())[1]:
                await asyncio.sleep(max(0.0, found[0] - time.monotonic()))
                writer.write(found[1])
                await writer.drain()
            writer.close()

        delivery = asyncio.create_task(deliver())
        while data := await reader.read(1 << 16):
            said.put_nowait((time.monotonic() + self.seconds / 2, data))
        said.put_nowait((0.0, b""))
        await delivery


def seconds_of(step: Callable[[], Any]) -> float:
    """By the clock."""
    began = time.monotonic()
    step()
    return time.monotonic() - began


def steps_of(path: str, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name."""
    return {
        "open": lambda: TeacherCache(path, options),
        "which blocks are missing": lambda: Store.existing(path, options).missing_blocks(),
        "open, and a random sample": lambda: TeacherCache(path, options)[300],
        "open, and an epoch in one process": lambda: list(TeacherCache(path, options).shuffled(8)),
    }


def main(delay: float) -> None:
    """Print a table in Markdown."""
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(Path(scratch) / "server")
        link = Link(int(server.options["endpoint"].rpartition(":")[2]))
        options = {**server.options, "endpoint": f"http://127.0.0.1:{link.port}"}
        print(f"| rows of a block | step | seconds | with {1000 * delay:.0f} ms | round trips |\n|---|---|---|---|---|")
        for rows in (1 << 16, 1 << 20):
            write_store(Path(scratch) / f"{rows}.zarr", rows)
            server.upload(Path(scratch) / f"{rows}.zarr", f"{rows}.zarr")
            path = f"s3://bucket/{rows}.zarr"
            for name, step in steps_of(path, options).items():
                step()  # warms the server up
                link.seconds = 0.0
                plain = seconds_of(step)
                link.seconds = delay
                slow = seconds_of(step)
                print(f"| {rows:,} | {name} | {plain:.2f} | {slow:.2f} | {(slow - plain) / delay:.0f} |", flush=True)
        server.kill()


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(float(given.get("milliseconds", "50")) / 1000)
