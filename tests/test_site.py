"""The pages as a site, without building it: links, anchors, navigation, and that pages name what is there."""

import importlib.util
import re
import subprocess
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import softvq
from tests.test_project import ROOT, documents, name_of

PAGES = [*documents(), ROOT / "experiments/README.md", ROOT / "notebooks/README.md"]


def script(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


hooks = script("scripts/site_hooks.py")
newcomer = script("benchmarks/newcomer.py")


def prose(path: Path) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings; those that stand there twice differ between hosts, so none is theirs."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    counts = Counter(hooks.anchor_of(re.sub(r"[`*]|\]\([^)]*\)", "", heading)) for heading in headings)
    return {anchor for anchor, count in counts.items() if count == 1}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (path.parent / link).resolve() if link else path
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = Counter(hooks.source_of(name) for name in hooks._named(nav))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= named.keys(), "add it to nav in mkdocs.yml"
    assert all((ROOT / name).is_file() for name in named)
    assert set(named.values()) == {1}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_the_same_files_on_the_site(path: Path) -> None:
    source = name_of(path)
    text = path.read_text(encoding="utf-8")
    assert hooks.source_of(hooks.page_of(source)) == source
    before = hooks.targets(text, source)
    links = dict(zip(hooks.LINK.findall(text), hooks.LINK.findall(hooks.rewritten(text, source)), strict=True))
    site = Path("/") / hooks.page_of(source)
    for link, target in before.items():
        assert (site.parent / links[link]).resolve() == Path("/") / hooks.page_of(target)


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("docs/index.md", "method.md", "method.md"),
        ("docs/reliability.md", "../SECURITY.md", "repository/SECURITY.md"),
        ("docs/reliability.md", "../tests/test_guard.py", "repository/tests/test_guard.py.md"),
        ("README.md", "docs/images/demo.jpg", "../images/demo.jpg"),
        ("experiments/README.md", "../docs/evaluation.md", "../../evaluation.md"),
        ("docs/index.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/index.md", "../../elsewhere.md", "../../elsewhere.md"),
    ],
)
def test_a_link_on_the_site(source: str, link: str, expected: str) -> None:
    assert hooks.rewritten(f"[a]({link}#b) [c]({link})", source) == f"[a]({expected}#b) [c]({expected})"


def test_pipes_in_the_code_of_tables() -> None:
    assert hooks.rewritten(r"| `q(z\|x)` | a \| b |", "docs/index.md") == r"| `q(z|x)` | a \| b |"


def test_what_is_loaded_from_elsewhere_is_found() -> None:
    page = '<a href="https://a.org"></a><img src="images/a.jpg"><script src="//b.org/x.js"></script>'
    page += '<link rel="stylesheet" href="https://c.org/x.css"><img alt="" src=https://d.org/x.png>'
    assert [tag.partition("//")[2][:5] for tag in hooks.LOADED.findall(page)] == ["b.org", "c.org", "d.org"]


def test_the_python_interface_is_complete() -> None:
    named = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for _, name in named) == sorted(softvq.__all__)
    for module, name in named:
        assert getattr(import_module(module), name) is getattr(softvq, name)


def test_every_row_of_the_method_stands_in_the_code() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    rows = re.search(r"## Paper and code\n\n.*\n.*\n((?:\|.*\n)+)", text)
    assert rows
    for row in rows[1].splitlines():
        place = row.rstrip(" |").rpartition(" | ")[2]
        paths = re.findall(r"`(softvq/[\w/]+(?:\.py|/))`", place)
        assert paths, row
        assert all((ROOT / path).exists() for path in paths), row
        for names, path in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `(softvq/[\w/]+)\.py`", place):
            for name in re.findall(r"`([\w.]+)`", names):
                found = import_module(path.replace("/", "."))
                for part in name.split("."):
                    found = getattr(found, part)


def test_every_command_of_the_quick_start_has_its_time() -> None:
    text = newcomer.PAGE.read_text(encoding="utf-8")
    timed = re.findall(r"^\| `(.+)` \| [\d.]+ \|$", text, re.MULTILINE)
    assert timed == newcomer.commands(text)
    assert len(timed) > 5


def test_commands_run_in_one_shell_until_one_fails(tmp_path: Path) -> None:
    seconds = newcomer.timed(["x=1", 'test "$x" = 1', "true"], tmp_path, tmp_path / "times")
    assert len(seconds) == 3
    assert newcomer.table(["x=1"], [2.34]).splitlines()[-2:] == ["| `x=1` | 2.3 |", "| together | 2.3 |"]
    with pytest.raises(subprocess.CalledProcessError):
        newcomer.timed(["false", "touch after"], tmp_path, tmp_path / "more")
    assert not (tmp_path / "after").exists()


def test_a_notebook_is_shown_as_text_and_code() -> None:
    page = hooks._shown("notebooks/tokens.ipynb")
    assert page.startswith("# Tokens of a photograph\n")
    assert "\n\n~~~ python\nlengths = [64, 32, 16]" in page
    assert '"cells"' not in page
