"""The examples of docs/data.md, run."""

import re
from pathlib import Path

import pytest

from tests.data import templates
from tests.data.support import run, shown
from tests.support import make_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```\n```text\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_becomes_what_the_page_shows(tmp_path: Path, number: int) -> None:
    row, expected = EXAMPLES[number]
    (tmp_path / "x.jsonl").write_text(row)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = templates.CHATML
    samples = run(f"dataset.path={tmp_path / 'x.jsonl'}", tokenizer=tokenizer)
    assert [text.removesuffix("\n") for text in shown(samples, tokenizer)] == [expected]


def test_no_example_is_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```json") == 8
