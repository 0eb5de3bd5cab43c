"""Hooks of mkdocs.yml, which let one text serve the site and a host of code.

Pages under docs/ link to files beside docs/, such as ../SECURITY.md or ../tests/test_guard.py. On the site those have a
place under `repository/`: Markdown becomes a page, anything else a page that shows it. Only what is linked to, directly
or by such a page, or named in the navigation, comes along.
"""

import json
import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

__all__ = [
    "anchor_of",
    "on_config",
    "on_files",
    "on_page_markdown",
    "on_post_build",
    "on_post_page",
    "page_of",
    "rewritten",
    "source_of",
    "targets",
]

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
PIPE = re.compile(r"`[^`\n]*\\\|[^`\n]*`")  # in tables hosts of code want it escaped within code, and mkdocs does not
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\"'>\s]+")
ELSEWHERE = re.compile(r"\bhttps?://[^\s<>)\"'`\]]+")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}

log = logging.getLogger("mkdocs.hooks.site")


def anchor_of(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading as hosts of code make it, so that one link serves both."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def page_of(path: str) -> str:
    """Return where a file of the repository stands among the pages, both with `/` and relative to their roots."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def source_of(page: str) -> str:
    """Return the Markdown file of the repository that a page is made of."""
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


def targets(text: str, source: str) -> dict[str, str]:
    """Return the relative links of a Markdown file that lead to files, and the paths of these in the repository."""
    found = {}
    for link in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if "://" not in link and not path.startswith("..") and (ROOT / path).is_file():
            found[link] = path
    return found


def rewritten(text: str, source: str) -> str:
    """Return a Markdown file of the repository with its links as they have to be on the site."""
    places = targets(text, source)
    here = posixpath.dirname(page_of(source))

    def replace(link: re.Match[str]) -> str:
        path = places.get(link[1])
        return link[1] if path is None else posixpath.relpath(page_of(path), here or ".")

    return PIPE.sub(lambda code: code[0].replace("\\|", "|"), LINK.sub(replace, text))


def _shown(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~~~ {language}\n{text}\n~~~~~~\n"


def _cell(kind: str, text: str) -> str:
    return text if kind == "markdown" else f"~~~ python\n{text}\n~~~"


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for entry in (nav.values() if isinstance(nav, dict) else nav) for name in _named(entry)]


def on_config(config: Any) -> Any:
    """Make anchors as hosts of code do."""
    config.mdx_configs["toc"]["slugify"] = anchor_of
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files beside docs/ that pages lead to."""
    from mkdocs.structure.files import File

    waiting = [source_of(name) for name in _named(config.nav)] + [f"docs/{file.src_uri}" for file in files]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        is_page = path.endswith(".md")
        if not path.startswith("docs/"):
            content = (ROOT / path).read_text(encoding="utf-8") if is_page else _shown(path)
            files.append(File.generated(config, page_of(path), content=content))
        if is_page:
            waiting += targets((ROOT / path).read_text(encoding="utf-8"), path).values()
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let the links of a page lead to pages."""
    return rewritten(markdown, source_of(page.file.src_uri))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn, which ends a strict build, of a page that would load something from elsewhere."""
    for tag in LOADED.findall(output):
        log.warning("%s%s loads from elsewhere: %s", page.file.src_uri, os.linesep, tag)
    return output


def on_post_build(config: Any) -> None:
    """List the addresses elsewhere that pages name; whether they answer is not asked."""
    found = sorted(
        {
            f"{link.rstrip('.,;')} {path.relative_to(ROOT)}"
            for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[en]*/*.md")]
            for link in ELSEWHERE.findall(path.read_text(encoding="utf-8"))
        }
    )
    (Path(config.site_dir) / "links-elsewhere.txt").write_text("\n".join(found) + "\n", encoding="utf-8")
