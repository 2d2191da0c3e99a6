"""The commands of the README and of docs/ have settings that exist, with values that these take."""

import re
import shlex
from pathlib import Path

import pytest

from distill.config.generate import GenerateConfig
from distill.config.rollout import RolloutConfig
from distill.config.train import TrainConfig
from distill.settings import load

ROOT = Path(__file__).parent.parent
CONFIGS = {"generate": GenerateConfig, "train": TrainConfig, "rollout": RolloutConfig}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str, str]]:
    """(page, module, arguments) of every command of distill in a fenced block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := re.search(r"-m distill\.(\w+)\b(.*)", line):
                    found.append((page.name, command[1], command[2].strip()))
    return found


@pytest.mark.parametrize(("page", "module", "arguments"), commands())
def test_a_command_of_the_docs_has_settings_that_exist(
    page: str, module: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where configs/ is
    assert (ROOT / "distill" / f"{module}.py").exists(), page
    if module in CONFIGS:
        words = shlex.split(arguments, comments=True)
        load(CONFIGS[module], [word for word in words if not word.startswith("--") and word != "..."])
