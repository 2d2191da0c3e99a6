"""The short form of tests/corruption.py."""

import random
import shutil
from pathlib import Path
from typing import Any

from tests import corruption
from tests.support import generate_here, tree


def test_no_damage_is_read_or_stays(tmp_path: Path) -> None:
    done, escaped, _ = corruption.run(60, 1, tmp_path)
    assert not escaped, "\n".join(escaped)
    assert done.total() == 60
    assert len({kind for kind, _ in done}) > 15
    assert {way for _, way in done} == {*corruption.DAMAGES}


def test_an_incomplete_copy_is_made_whole_without_a_repair(tmp_path: Path) -> None:
    """Chunks of every kind are missing: generate sees that, also of a store that says that it is complete."""
    models: dict[str, Any] = {}
    with corruption.small_chunks():
        for victim in corruption.make(tmp_path, models):
            chunks = sorted(name for name in victim.bytes if not name.endswith("zarr.json"))
            for number in range(3):
                folder = tmp_path / "copy.zarr"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(victim.store, folder)
                for name in random.Random(number).sample(chunks, (1, 4, len(chunks) // 2)[number]):
                    (folder / name).unlink()
                generate_here(tmp_path, *victim.arguments, f"store.path={folder}", models=models)
                assert tree(folder) == victim.bytes
