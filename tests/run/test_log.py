"""Whatever is said can be written: on a console that knows only ASCII, and in a log."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from distill.config.generate import GenerateConfig
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


def test_without_a_home_caches_are_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else transformers and datasets make a folder named ~."""
    monkeypatch.setenv("XDG_CACHE_HOME", "set")  # so that what is set below is taken back
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for home, expected in (("/", None), (None, f"{tmp_path}/cache-{os.getuid()}")):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a user whom nobody knows
        if home:
            monkeypatch.setenv("HOME", home)
            monkeypatch.setenv("XDG_CACHE_HOME", "mine")
        run_worker(GenerateConfig, "x", ["--help"], lambda config, grid, session: None)
        assert os.environ["XDG_CACHE_HOME"] == (expected or "mine")
