"""README and docs: links lead somewhere, named files exist, lines are short enough to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# pages on parity name files of the published systems
OWN_PAGES = [page for page in PAGES if "parity" not in page.relative_to(REPOSITORY).as_posix()]
FOLDERS = ("src", "config", "perf", "rules", "workflow", "tests", "profiles", "envs", "docs")
LIBRARY = REPOSITORY / "src/mmpipe"
WRITTEN_BY_USERS = {"config/lock.json"}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of ``page``."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def exists(named: str) -> bool:
    """Whether a file named in the documents exists; ``{name}`` and ``*`` stand for any name."""
    pattern = re.sub(r"\{[^}]*\}", "*", named)
    return any(True for _ in REPOSITORY.glob(pattern)) if "*" in pattern else (REPOSITORY / pattern).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_have_at_most_120_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [f"{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > 120]


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: page.name)
def test_named_files_and_modules_exist(page):
    text = re.sub(r"^```(yaml|python).*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    paths = re.findall(rf"(?<![\w./~-])((?:{'|'.join(FOLDERS)})/[\w.{{}}*/-]*\w[}}*/]?)", text)
    modules = re.findall(r"`(mmpipe(?:\.[a-z_]\w*)+)", text)
    assert not [path for path in paths if path not in WRITTEN_BY_USERS and not exists(path)]
    assert not [module for module in modules if not importable(module)]


def importable(module: str) -> bool:
    """Whether a dotted name is a module of the library, or a name in one."""
    parts = module.split(".")[1:]
    whole, outer = LIBRARY.joinpath(*parts), LIBRARY.joinpath(*parts[:-1])
    if whole.is_dir() or whole.with_suffix(".py").exists():
        return True
    source = outer.with_suffix(".py")
    return bool(parts) and source.exists() and re.search(rf"\b{parts[-1]}\b", source.read_text("utf-8")) is not None


def test_the_files_of_the_glossary_and_the_architecture_exist():
    missing = []
    for name in ("glossary", "architecture"):
        text = (REPOSITORY / f"docs/{name}.md").read_text(encoding="utf-8")
        for path in re.findall(r"`([a-z_]+/[\w/{}.]*\w\.py)`", text):
            pattern = path.replace("{name}", "*")
            if not (any(LIBRARY.glob(pattern)) or any(REPOSITORY.glob(pattern))):
                missing.append(f"{name}: {path}")
    assert not missing


def test_the_readme_is_one_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 80
