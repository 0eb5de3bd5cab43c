"""The photographs that come with the package, which both demos use, and who took them."""

import csv
from pathlib import Path

import softvq
from softvq.errors import InputError

__all__ = ["ASSETS", "credits_of_photos", "photos_of"]

ASSETS = Path(softvq.__file__).parent / "assets"


def photos_of(part: str) -> Path:
    """Return the folder of the bundled photographs `train` or `val`; an InputError says if it is missing."""
    folder = ASSETS / "photos" / part
    if not folder.is_dir():
        raise InputError(f"{folder}: the bundled photographs are missing; install softvq again")
    return folder


def credits_of_photos() -> dict[str, str]:
    """Return author and licence of every bundled photograph by its path."""
    manifest = ASSETS / "photos/manifest.csv"
    if not manifest.is_file():
        return {}
    with manifest.open(newline="", encoding="utf-8") as file:
        return {row["file"]: f"{row['author']}, {row['licence']}" for row in csv.DictReader(file)}
