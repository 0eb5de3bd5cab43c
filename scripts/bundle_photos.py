"""Choose the photographs that ship with softvq and write them small: `python scripts/bundle_photos.py SOURCE`.

SOURCE holds `manifest.csv`, `ATTRIBUTION.txt` and `everyday/{train,val}/CLASS/*.jpg`. The choice is a pure function of
the manifest: the pictures of a class in the order of their hashes, so that running it again gives the same files.
"""

import argparse
import csv
import io
import shutil
from pathlib import Path

from PIL import Image

from softvq.data.images import read_image
from softvq.files import sha256, write_bytes, write_text

TARGET = Path(__file__).parent.parent / "softvq/assets/photos"
SIZE = 128
QUALITY = 82
MAX_BYTES = 2_900_000

# Left out: flowers (each needs a link beside it), cartons (brands), printed shirts and caps (logos).
CLOTHES = "blazer dress longsleeve outwear pants polo shirt shoes shorts skirt undershirt"
GROCERIES = (
    "apple aubergine avocado banana cabbage carrots kiwi lemon lime melon orange papaya peach pear pepper pineapple "
    "plum potato tomato zucchini"
)
COUNTS = {
    "train": dict.fromkeys(CLOTHES.split(), 26) | dict.fromkeys(GROCERIES.split(), 12),
    "val": dict.fromkeys(CLOTHES.split(), 1)
    | dict.fromkeys(GROCERIES.split()[::2], 1)
    | {"dress": 2, "pepper": 2, "shoes": 2},
}

# Seen on the contact sheet: worn clothes, brands, cartoon figures, price tags. PART/CLASS_NUMBER.
UNSUITABLE = """
train/dress_0221 train/longsleeve_0019 train/longsleeve_0020 train/longsleeve_0053 train/longsleeve_0089
train/longsleeve_0104 train/longsleeve_0150 train/longsleeve_0174 train/longsleeve_0199 train/longsleeve_0231
train/longsleeve_0279 train/orange_0041 train/orange_0045 train/orange_0070 train/outwear_0138
train/pants_0041 train/pants_0306 train/pants_0335 train/pants_0397 train/polo_0023 train/polo_0030
train/polo_0088 train/shirt_0112 train/shoes_0245 train/shorts_0049 train/shorts_0057 train/shorts_0085
train/shorts_0122 train/shorts_0196 train/undershirt_0012 train/undershirt_0015 train/undershirt_0031
train/undershirt_0035 train/undershirt_0039 train/undershirt_0043 train/undershirt_0047 train/undershirt_0068
train/undershirt_0079 train/undershirt_0096 val/longsleeve_0020 val/plum_0001 val/shoes_0023 val/shorts_0005
"""

COLUMNS = ("file", "class", "licence", "author", "source", "source_file", "sha256")


def main() -> None:
    """Write `softvq/assets/photos` anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder with manifest.csv, ATTRIBUTION.txt and everyday/")
    source = parser.parse_args().source
    with (source / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if TARGET.is_dir():
        shutil.rmtree(TARGET)
    bundled = [bundle(source, row) for row in choose(rows)]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(bundled)
    write_text(TARGET / "manifest.csv", table.getvalue())
    write_text(TARGET / "ATTRIBUTION.txt", attribution((source / "ATTRIBUTION.txt").read_text()))
    total = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    counts = ", ".join(f"{part} {sum(row['file'].startswith(part) for row in bundled)}" for part in COUNTS)
    print(f"{TARGET}: {counts}, {total:,} bytes")
    if total > MAX_BYTES:
        raise SystemExit(f"more than {MAX_BYTES:,} bytes; lower COUNTS")


def choose(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the manifest rows to bundle, sorted by file name."""
    chosen, unsuitable = [], set(UNSUITABLE.split())
    for part, counts in COUNTS.items():
        for name, count in counts.items():
            usable = [
                r
                for r in rows
                if r["split"] == part and r["class"] == name and f"{part}/{Path(r['file']).stem}" not in unsuitable
            ]
            chosen += sorted(usable, key=lambda row: row["sha256"])[:count]
    return sorted(chosen, key=lambda row: row["file"])


def bundle(source: Path, row: dict[str, str]) -> dict[str, str]:
    """Write one photograph small and return its row of the new manifest."""
    photograph = read_image(source / "everyday" / row["file"])
    side = min(photograph.size)
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    box = (left, top, left + side, top + side)
    data = io.BytesIO()
    small = photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)
    small.save(data, "JPEG", quality=QUALITY, optimize=True)
    write_bytes(TARGET / row["file"], data.getvalue())
    return {**{name: row[name] for name in COLUMNS}, "sha256": sha256(TARGET / row["file"])}


def attribution(text: str) -> str:
    """Return the part of the data set's attribution that is about what is bundled: no flowers."""
    header, *paragraphs = text.split("\n\n")
    kept = [paragraph for paragraph in paragraphs if "Flower photographs" not in paragraph]
    assert "MIT" in text, header
    assert len(kept) < len(paragraphs), "no paragraph about flowers to leave out"
    opening = (
        f"Photographs of clothes and of fruit and vegetables in shops, {SIZE} x {SIZE} pixels. CC0 and MIT sources.\n"
        "manifest.csv beside this file names the source file, author and licence of each.\n\n"
    )
    changes = f"For this bundle they were resized once more to {SIZE} x {SIZE} (Lanczos), JPEG quality {QUALITY}.\n\n"
    body = "\n\n".join(paragraph.strip("\n") for paragraph in kept)
    before, marker, after = body.partition("MIT licence text")
    return opening + before.rstrip() + "\n" + changes + marker + after.rstrip() + "\n"


if __name__ == "__main__":
    main()
