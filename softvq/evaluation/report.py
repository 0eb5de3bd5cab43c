"""The page of a report: the most telling numbers, sections with a picture and a table each, and how it was made."""

import dataclasses
from collections.abc import Mapping, Sequence

from PIL import Image

from softvq.evaluation.page import data_uri, escaped, html_page

__all__ = ["Section", "report_page"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of the page."""

    title: str
    """Heading."""
    text: str
    """What is shown and how to read it."""
    picture: Image.Image | None = None
    """Its figure, if it has one."""
    caption: str = ""
    """Below the figure, and what screen readers say of it."""
    rows: Sequence[tuple[str, str]] = ()
    """A table of numbers beside their names."""


def report_page(
    title: str, lead: str, summary: Sequence[tuple[str, str]], sections: Sequence[Section], facts: Mapping[str, str]
) -> str:
    """Return one self-contained HTML page: no script, and nothing is fetched from anywhere.

    Args:
        title: Heading of the page.
        lead: One sentence below it.
        summary: The most telling numbers, each after its name.
        sections: In order of appearance.
        facts: What a reader needs to get the same page again.

    Returns:
        The text of the file; all text is escaped, so it may come from strangers.
    """
    tiles = "\n".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in summary)
    main = [*map(_section, sections), "<h2>How this page was made</h2>", _table(list(facts.items()))]
    return html_page(title, lead, tiles, "\n".join(main), REPORT_STYLE)


def _section(section: Section) -> str:
    return f"""<section>
<h2>{escaped(section.title)}</h2>
<p class="lead">{escaped(section.text)}</p>
{_figure(section)}
{_table(section.rows)}
</section>"""


def _figure(section: Section) -> str:
    if section.picture is None:
        return ""
    width, height = section.picture.size
    caption = escaped(section.caption)
    return f"""<figure><img src="{data_uri(section.picture)}" width="{width}" height="{height}" alt="{caption}">
<figcaption>{caption}</figcaption></figure>"""


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>' for name, value in rows)
    return f"<table>\n{lines}\n</table>" if rows else ""


REPORT_STYLE = """
section .lead { margin-bottom: 1rem; }
section img { width: auto; max-width: 100%; }
section table { margin-top: 1rem; }
"""
