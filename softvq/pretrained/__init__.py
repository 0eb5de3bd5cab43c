"""Models that come with the package: a folder for each, as `save_pretrained` writes them."""

import os
import re
from pathlib import Path

__all__ = ["bundled", "names"]

FOLDER = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def names() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json") if NAME.fullmatch(path.parent.name))


def bundled(name: str) -> Path | None:
    """Return the folder of a bundled model, such as `photos-64`, or None if there is none of that name."""
    if not NAME.fullmatch(name):  # a path would lead out of here
        return None
    folder = FOLDER / name
    return folder if os.path.isfile(folder / "config.json") else None  # which takes names of any length
