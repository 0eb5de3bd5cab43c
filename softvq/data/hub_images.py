"""Image data sets of Hugging Face's `datasets`, from disk or from the hub, read by row."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from softvq.data.images import read_image
from softvq.errors import InputError

__all__ = ["HubImages", "open_hub_images"]

FIELDS = ("NAME", "SPLIT", "IMAGE_COLUMN", "LABEL_COLUMN")
LABELS = ("label", "labels", "fine_label")
ROWS = 4096
PARTS = r"(?:[-_. ]*(?:\d+|of|part|shard|chunk|[0-9a-f]{12,}))*"
"""What may stand between the name of a split and the suffix, as in `train-00000-of-00002`; `train_extra` is another."""


def open_hub_images(where: str) -> "HubImages":
    """Look at an image data set.

    Args:
        where: `hf:NAME[:SPLIT[:IMAGE_COLUMN[:LABEL_COLUMN]]]`. NAME is a folder that `save_to_disk` wrote, a .parquet
            file or a folder of such files, or a repository on the hub; SPLIT is `train` by default.

    Returns:
        Its pictures in the order of their rows.

    Raises:
        InputError: If `datasets` is not installed, or there is no such data set, split or column.
    """
    name, *fields = where.removeprefix("hf:").split(":")
    if not name or len(fields) >= len(FIELDS):
        raise InputError(f"{where}: expected hf:{FIELDS[0]}, and then perhaps :{':'.join(FIELDS[1:])}")
    split, image, label = (field or None for field in [*fields, *[None] * 3][:3])
    table = _table(where, name, split)
    return HubImages(where, table, _image_column(where, table, image), _label_column(where, table, label))


class HubImages:
    """The pictures of a column of a table.

    Args:
        title: What the user gave.
        table: A `datasets.Dataset`.
        image: The column of pictures.
        label: The column of classes, numbers or texts, if there is one.

    Raises:
        InputError: If it has no rows, keeps paths instead of pictures, or labels are neither numbers nor texts.
    """

    def __init__(self, title: str, table: Any, image: str, label: str | None) -> None:
        import datasets

        self.title, self._column = title, image
        self._table = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        if not len(table):
            raise InputError(f"{title}: has no rows; give another split")
        width = len(str(len(table) - 1))
        self.names: Sequence[str] = [f"{row:0{width}d}" for row in range(len(table))]
        self.classes, self.labels = ([], [-1] * len(table)) if label is None else _classes(title, table, label)
        self.remarks: list[str] = []

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Read a picture."""
        name = f"{self.title}: row {index}"
        cell = self._table[index][self._column]
        if not cell or not cell.get("bytes"):  # a path would let a table name any file of this machine
            raise InputError(f"{name}: has no picture in it; save the data set with save_to_disk, which takes them in")
        return read_image(cell["bytes"], max_pixels, name)

    def sizes(self) -> Iterable[int]:
        """Return the bytes of every picture, from the lengths that the table keeps; -1 where there is none."""
        import pyarrow.compute as pc

        for part in self._table.with_format("arrow").iter(batch_size=ROWS):
            for chunk in part.column(self._column).chunks:
                lengths = pc.call_function("binary_length", [chunk.field("bytes")])
                yield from (-1 if length is None else length for length in lengths.to_pylist())


def _table(where: str, name: str, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{where}: needs datasets, which is not installed; pip install 'softvq[data]'") from error
    path = Path(name)
    files = _parquet(path, split)
    try:
        if files:
            return datasets.Dataset.from_parquet([str(file) for file in files])
        found: Any = datasets.load_from_disk(name) if path.is_dir() else _from_hub(name, split)
    except InputError:
        raise
    except Exception as error:  # of its files, of Arrow, of the network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: is no data set that can be opened here ({reason[:300]})") from error
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            raise InputError(
                f"{where}: has no split {split or 'train'!r}, expected one of {', '.join(map(str, found))}"
            )
        return found[split or "train"]
    return found


def _from_hub(name: str, split: str | None) -> Any:
    import datasets

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"hf:{name}: no such folder, and no name of a repository on the hub")
    return datasets.load_dataset(name, split=split or "train")


def _parquet(path: Path, split: str | None) -> list[Path]:
    """Return the files of a table; in a folder those that are named after the split or lie in its folder, if any do."""
    if path.suffix == ".parquet" and path.is_file():
        return [path]
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    wanted = re.escape(split or "train")
    named = re.compile(rf"(?:.*/)?{wanted}(?:/.*|{PARTS}\.parquet)", re.DOTALL)
    chosen = [file for file in found if named.fullmatch(file.relative_to(path).as_posix())]
    return chosen or ([] if split else found)


def _image_column(where: str, table: Any, wanted: str | None) -> str:
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if wanted is None and found:
        return found[0]
    if wanted is None:
        raise InputError(f"{where}: has no column of images, but {', '.join(table.column_names)}")
    if wanted not in table.column_names:
        raise InputError(f"{where}: has no column {wanted!r}, expected one of {', '.join(found or table.column_names)}")
    if wanted not in found:
        raise InputError(f"{where}: the column {wanted!r} holds no images; those of images are {', '.join(found)}")
    return wanted


def _label_column(where: str, table: Any, wanted: str | None) -> str | None:
    if wanted is None:
        return next((name for name in LABELS if name in table.column_names), None)
    if wanted not in table.column_names:
        raise InputError(f"{where}: has no column {wanted!r}, expected one of {', '.join(table.column_names)}")
    return wanted


def _classes(title: str, table: Any, column: str) -> tuple[list[str], list[int]]:
    import datasets

    values, feature = list(table[column]), table.features[column]
    if all(isinstance(value, str) for value in values):
        classes = sorted(set(values))
        places = {value: place for place, value in enumerate(classes)}
        return classes, [places[value] for value in values]
    if not all(value is None or (type(value) is int and -1 <= value < 1 << 20) for value in values):
        raise InputError(f"{title}: the column {column!r} holds neither numbers of classes nor their names")
    labels = [-1 if value is None else value for value in values]
    named = list(feature.names) if isinstance(feature, datasets.ClassLabel) else []
    return named if len(named) > max(labels) else [str(number) for number in range(max(labels) + 1)], labels
