"""Whatever is said can be written: on a console that knows only ASCII, and in a log."""

import io
import logging
import sys
from pathlib import Path

import pytest

from distill.config import GenerateConfig
from distill.run.log import _LogFile
from distill.run.session import run_worker


def test_an_ascii_console_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of entry points that run workers; tests/test_inspect.py has the other."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert run_worker(GenerateConfig, "é\udcff", ["--help"], lambda config, grid, session: None) == 0
    console.flush()
    assert console.buffer.getvalue().startswith(b"usage: \\xe9\\udcff [CONFIG.yaml")


def test_a_log_takes_any_text(tmp_path: Path) -> None:
    log = _LogFile(tmp_path / "log", lambda: None)
    log.emit(logging.makeLogRecord({"msg": "é of a name that is no text: \udcff"}))
    log.close()
    assert (tmp_path / "log").read_bytes().decode() == "é of a name that is no text: \\udcff\n"
