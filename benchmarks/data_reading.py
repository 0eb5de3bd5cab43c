"""How fast photographs come from a folder and from tar shards of it: batches as training takes them, in turns.

Without arguments it makes JPEG photographs of its own. `--cold` lets the system forget the files before every round, so
that they are read from the disk. `--members N` times instead the index of an archive of N small members.
"""

import argparse
import os
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from softvq.commands.common import machine_name
from softvq.data.folder import DataConfig, PhotoFolder, batches
from softvq.data.packing import pack_folder
from softvq.data.shards import open_shards

CLASSES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of photographs (default: made on the spot)")
    parser.add_argument("--count", type=int, default=4000, help="photographs to make (default: 4000)")
    parser.add_argument("--side", type=int, default=320, help="their shorter side in pixels (default: 320)")
    parser.add_argument("--size", type=int, default=256, help="side of the crops (default: 256)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="of a round (default: 30)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: 2)")
    parser.add_argument("--shard-megabytes", type=int, default=64)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the system's cache")
    parser.add_argument("--members", type=int, help="time the index of an archive of so many members instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.members:
            measure_index(Path(temporary), arguments.members)
        else:
            measure(arguments, Path(temporary))


def measure(arguments: argparse.Namespace, temporary: Path) -> None:
    photos = arguments.photos or made(temporary / "photos", arguments.count, arguments.side)
    start = time.perf_counter()
    packed = pack_folder(photos, temporary / "shards", arguments.shard_megabytes << 20)
    seconds = time.perf_counter() - start
    print(f"{packed.pictures:,} photographs, {packed.num_bytes / 2**20:,.0f} MiB in {packed.shards} shards")
    print(f"packed at {packed.pictures / seconds:,.0f} photographs/s")
    where = {"folder": photos, "shards": temporary / "shards"}
    opening: dict[str, list[float]] = {name: [] for name in where}
    reading: dict[str, list[float]] = {name: [] for name in where}
    computing: dict[str, list[float]] = {name: [] for name in where}
    for _ in range(arguments.rounds):
        for name, root in where.items():
            if arguments.cold:
                forget(root)
            config = DataConfig(num_workers=arguments.workers, cache_megabytes=0)
            start = time.perf_counter()
            source = PhotoFolder(root, arguments.size, config, seed=len(opening[name]))
            opening[name].append(time.perf_counter() - start)
            before = cpu_seconds()
            stream = batches(source, arguments.batch, 0, arguments.steps + 2, arguments.workers)
            for _ in range(2):  # in which workers start
                next(stream)
            start = time.perf_counter()
            count = sum(len(batch.labels) for batch in stream)
            reading[name].append(count / (time.perf_counter() - start))
            del stream  # ends the workers, whose time counts from then on
            computing[name].append((cpu_seconds() - before) / (arguments.batch * (arguments.steps + 2)))
    kept = "from the disk" if arguments.cold else "from the system's cache"
    load = os.getloadavg()[0]
    print(f"{machine_name(torch.device('cpu'))}, {os.cpu_count()} cores, {arguments.workers} workers, {kept}")
    print(f"load average at the end: {load:.1f}")
    print("| source | images/s, median of rounds | lowest to highest | CPU ms an image, median | lowest | s to open |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in where:
        speeds = reading[name]
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        cpu = f"{1e3 * statistics.median(computing[name]):.2f} | {1e3 * min(computing[name]):.2f}"
        print(
            f"| {name} | {statistics.median(speeds):,.0f} | {spread} | {cpu} | {statistics.median(opening[name]):.3f} |"
        )


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure_index(temporary: Path, count: int) -> None:
    path = temporary / "many.tar"
    with path.open("wb") as file:
        for number in range(count):
            entry = tarfile.TarInfo(f"class{number % CLASSES}/{number:09d}.png")
            file.write(entry.tobuf(tarfile.PAX_FORMAT))
        file.write(bytes(10240))
    for name in ("made", "read"):
        start = time.perf_counter()
        source = open_shards(str(path))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"index of {len(source.names):,} members {name} in {seconds:.1f} s, peak memory {peak:,.0f} MiB")
    print(f"{machine_name(torch.device('cpu'))}, {os.cpu_count()} cores")


def made(root: Path, count: int, side: int) -> Path:
    for number in range(count):
        draw = np.random.default_rng(number)
        coarse = draw.integers(0, 256, (side // 16, side // 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        noise = draw.normal(0, 6, (side, side * 4 // 3, 3))
        path = root / f"class{number % CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root


def forget(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
