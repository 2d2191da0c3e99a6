"""Imports go strictly down: who may import whom, as a table. An arrow that goes up fails here."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "distill"
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "processes": set(),
    "log": {"errors", "processes", "progress"},
    "settings": {"errors"},
    "config": {"errors", "settings"},
    "device": {"errors"},
    "metrics": set(),
    "fingerprint": {"errors"},
    "plan": {"errors"},
    "sparse": {"errors"},
    "store": {"errors"},
    "board": {"errors"},
    "parallel": {"errors", "board"},
    "watch": {"errors", "board", "parallel"},
    "nodes": {"errors", "board", "parallel", "settings"},
    "schema": {"store"},
    "chat": {"errors"},
    "data": {"errors", "config", "fingerprint", "chat"},
    "teacher": {"errors", "config", "device", "fingerprint", "sparse", "parallel"},
    "samples": {"errors", "store"},
    "shuffle": {"samples"},
    "cache": {"errors", "fingerprint", "samples", "shuffle"},
    "loss": {"errors"},
    "checkpoint": {"errors"},
    "student": {"errors", "config", "loss", "teacher"},
    "evaluate": {"cache", "loss", "samples"},
    "prepare": {"errors", "config", "fingerprint", "data", "plan", "schema", "store", "teacher"},
    "worker": {"errors", "board", "config", "plan", "schema", "sparse", "store", "teacher", "watch"},
    "report": {"config", "store", "worker"},
    "generate": {
        "errors",
        "log",
        "nodes",
        "config",
        "settings",
        "device",
        "parallel",
        "prepare",
        "report",
        "store",
        "teacher",
        "watch",
        "worker",
    },
    "train": {
        "errors",
        "log",
        "processes",
        "nodes",
        "config",
        "settings",
        "device",
        "parallel",
        "fingerprint",
        "cache",
        "loss",
        "student",
        "checkpoint",
        "evaluate",
        "metrics",
        "samples",
        "shuffle",
        "watch",
    },
    "hf": {"errors", "config", "cache", "loss", "samples", "student", "teacher"},
    "inspect": {"errors", "config", "settings", "report", "store", "teacher"},
}


def imported_by(file: Path) -> set[str]:
    """The rooms of distill that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distill":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("distill.")}
    return {name for name in found if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}


def test_imports_go_down() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            assert imported_by(file) - {room} <= MAY_IMPORT[room], file


def test_only_the_store_knows_zarr_and_the_plan_knows_no_torch() -> None:
    for file in PACKAGE.rglob("*.py"):
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert "zarr" not in names or file.name == "store.py"
        assert "torch" not in names or file.name not in ("plan.py", "config.py", "data.py", "store.py")
