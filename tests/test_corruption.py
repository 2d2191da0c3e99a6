"""The short form of tests/corruption.py."""

from pathlib import Path

from tests import corruption


def test_no_damage_is_read_or_stays(tmp_path: Path) -> None:
    done, escaped, _ = corruption.run(60, 1, tmp_path)
    assert not escaped, "\n".join(escaped)
    assert done.total() == 60
    assert len({kind for kind, _ in done}) > 15
    assert {way for _, way in done} == {*corruption.DAMAGES}
