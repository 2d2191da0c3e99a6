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


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
