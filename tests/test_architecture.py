"""The rooms: imports go strictly down, each room names what it offers, and the README shows them as they are."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distill"
TORCHLESS = ("data", "store", "config", "settings", "values", "errors", "credentials")
README = (ROOT / "README.md").read_text().partition("## The files")[2]


def floors() -> list[list[str]]:
    """The rooms as the README's table has them, from the top floor down; rooms of one floor are in one row."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", README, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    return [[name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([\w./]+)`", row)] for _, row in rows]


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything of distill that a file imports, wherever in the file; the name may be empty."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distill":
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "distill"]
    return found


def room_of(module: str, name: str) -> str | None:
    """The room, or the file of the top floor, that an import leads to; None for the package itself."""
    parts = [*module.split("."), name]
    known = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists())
    return parts[1] if known else None


def files() -> list[tuple[str, Path]]:
    """Every module, with its room."""
    found = [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in sorted(PACKAGE.rglob("*.py"))]
    return [(room, file) for room, file in found if room != "__init__"]


def test_imports_go_down() -> None:
    floor = {room: number for number, rooms in enumerate(floors()) for room in rooms}
    for room, file in files():
        for module, name in imports(file):
            target = room_of(module, name)
            if target not in (None, room):
                assert floor[target] > floor[room], f"{file} imports {module}, which is not below {room}"


def test_every_room_has_its_place_in_the_readme() -> None:
    assert sorted(room for rooms in floors() for room in rooms) == sorted({room for room, _ in files()})
    tree = README[README.index("\ndistill/\n") :].split("\nconfigs/")[0]
    shown = {name for name in re.findall(r"(\w+\.py)\b", tree) if name != "__init__.py"}
    there = [file.name for _, file in files() if file.name != "__init__.py"]
    assert shown == {*there}
    assert len(there) == len(re.findall(r"(\w+\.py)\b", tree)), "a file is missing in the README's tree, or shown twice"
    for folder in re.findall(r"^(\w+)/", README[README.index("\ndistill/\n") :], re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_a_room_names_what_others_use_of_it() -> None:
    missing = set()
    for room, file in files():
        for module, name in imports(file):
            target = room_of(module, name)
            if target not in (None, room) and (PACKAGE / target).is_dir():
                offered = ast.get_docstring(ast.parse((PACKAGE / target / "__init__.py").read_text())) or ""
                if not re.search(rf"\b{name}\b", offered):
                    missing.add(f"{target}/__init__.py does not name {name}, which {room} uses")
    assert not missing, "\n".join(sorted(missing))


def test_only_the_store_knows_zarr_and_the_plan_knows_no_torch() -> None:
    for room, file in files():
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert "zarr" not in names or room == "store", file
        assert "torch" not in names or room not in TORCHLESS, file
