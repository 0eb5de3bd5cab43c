import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softvq.data import packing
from softvq.data.packing import pack_folder
from softvq.data.shards import INDEX_SUFFIX
from softvq.data.sources import open_source
from softvq.errors import InputError
from tests.image_zoo import encoded, png_header
from tests.program import Program, contents, full_disk, make_model, make_photos, photograph, write_recipe
from tests.shards import picture, write_tar

SMALL = 20480
"""Bytes of a shard."""


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Program(capsys)


def make_set(root: Path) -> Path:
    """Write photographs whose report can be told beforehand."""
    for name, size in {"a/0.png": (64, 70), "a/1.png": (63, 900), "b/2.png": (300, 256), "b/3.png": (255, 2)}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (size[0] % 256, 0, 0)).save(root / name)
    image = photograph(80, 90)
    for name in ("a/again.png", "b/once.png", "b/twice.webp"):  # the same pixels in other files
        image.save(root / name, lossless=True, quality=50)
    (root / "b/bad.jpg").write_bytes(b"no picture")
    (root / "a/bomb.png").write_bytes(png_header(9000, 9000))
    return root


@pytest.mark.parametrize("workers", [0, 3])
def test_a_check_finds_what_was_made(program: Program, workers: int) -> None:
    make_set(Path("set"))
    make_photos(Path("val"), ("x.png", "y.png"))
    shutil.copy("set/b/once.png", "val/z.png")
    arguments = ["data", "check", "set", "--val", "val", "--json", "--workers", workers]
    result = program(*arguments)
    assert result.code == 2
    assert result.err == (
        "softvq: set: 2 of 9 photographs cannot be read, the first is a/bomb.png; repair or remove them\n"
    )
    report = json.loads(result.out)
    assert (report["pictures"], report["classes"], report["unlabelled"]) == (9, {"a": 4, "b": 5}, 0)
    bins = {"below 64": 2, "64-127": 4, "128-255": 0, "256-511": 1, "512-1023": 0, "1024-2047": 0}
    assert report["shorter_sides"] == {**bins, "2048 and more": 0}
    assert sorted(report["unreadable"]) == ["a/bomb.png", "b/bad.jpg"]
    assert report["too_small"] == {"a/1.png": [63, 900], "b/3.png": [255, 2]}
    assert report["duplicates"] == [["a/again.png", "b/once.png", "b/twice.webp"]]
    assert report["in_train_and_val"] == [["a/again.png", "z.png"]]
    assert report["fingerprint"] == __import__("softvq").data.sources.fingerprint_of(open_source("set"))
    assert (report["val"]["pictures"], report["val"]["classes"]) == (3, {})


def test_a_check_prints_tables(program: Program) -> None:
    make_set(Path("set"))
    Path("set/b/bad.jpg").unlink()
    result = program("data", "check", "set", "--val", "set", "--max-pixels", "90000000", "--min-side", 3)
    assert result.code == 2  # the bomb is within the limit now, and has no data
    for words in ("too small: b/3.png: 255 x 2", "the same pixels: a/again.png = b/once.png = b/twice.webp"):
        assert words in result.out
    assert "set: 7 are in set too" in result.out
    Path("set/a/bomb.png").unlink()
    assert program("data", "check", "set").code == 0
    program.refuses("data", "check", "nowhere", names=("nowhere: no such file or folder",))
    program.refuses("data", "check", "set", "--max-pixels", 10**9, names=("--max-pixels is 1000000000",))


def test_packing_makes_the_same_bytes_wherever_it_goes_on(program: Program) -> None:
    names = tuple(f"{'ab'[i % 2]}/{i}.png" for i in range(8))
    make_photos(Path("photos"), names)
    first = pack_folder("photos", "first", SMALL)
    assert (first.pictures, first.made) == (8, first.shards)
    assert first.shards > 3
    whole = contents(Path("first"))
    for done in range(first.shards):

        def stopping(shards: Any, done: int = done) -> Any:
            yield from shards[:done]
            raise KeyboardInterrupt

        out = Path(f"out{done}")
        with pytest.raises(KeyboardInterrupt):
            pack_folder("photos", out, SMALL, stopping)
        program.refuses("data", "check", out, names=(out, "packing is not finished"))
        (out / ".shard-000001.tar.0123abcd.tmp.tar").write_bytes(b"left by a kill")
        assert pack_folder("photos", out, SMALL).made == first.shards - done
        assert contents(out) == whole
    Path(f"first/shard-000001.tar{INDEX_SUFFIX}").unlink()
    Path("first/shard-000002.tar").unlink()
    assert pack_folder("photos", "first", SMALL).made == 1
    assert contents(Path("first")) == whole


def test_packing_goes_on_with_photographs_as_they_are_now(program: Program) -> None:
    """One is replaced by another of the same name and size."""
    make_photos(Path("photos"), tuple(f"{i}.png" for i in range(6)))
    first = pack_folder("photos", "out", SMALL)
    assert pack_folder("photos", "out", SMALL).made == 0
    data = bytearray(Path("photos/2.png").read_bytes())
    data[-1] ^= 1
    Path("new.png").write_bytes(data)
    os.utime("new.png", (0, 0))  # moved here from elsewhere, its time of writing says nothing
    time.sleep(0.02)
    Path("new.png").replace("photos/2.png")
    again = pack_folder("photos", "out", SMALL)
    assert (again.shards, again.made) == (first.shards, 1)
    pack_folder("photos", "anew", SMALL)
    assert contents(Path("out")) == contents(Path("anew"))


KILLED = """
import os, signal, sys
from softvq.data import packing
write, count = packing.write_index, 0
def deadly(path, index):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, index)
packing.write_index = deadly
packing.pack_folder("photos", "out", 20480)
"""


def test_a_kill_between_a_shard_and_its_index_loses_nothing(program: Program) -> None:
    make_photos(Path("photos"), tuple(f"{i}.png" for i in range(6)))
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == -9
    assert Path("out/shard-000001.tar").exists()
    assert not Path(f"out/shard-000001.tar{INDEX_SUFFIX}").exists()
    assert program("data", "pack", "photos", "out").code == 2  # with other options
    pack_folder("photos", "whole", SMALL)
    pack_folder("photos", "out", SMALL)
    assert contents(Path("out")) == contents(Path("whole"))


def test_packing_refuses_what_is_not_its_own(program: Program) -> None:
    make_photos(Path("photos"), ("a.png", "b.png"))
    Path("full").mkdir()
    Path("full/mine.txt").write_text("x")
    Path("file").write_text("x")
    before = contents(Path("full"))
    program.refuses("data", "pack", "photos", "full", names=("full: holds mine.txt",))
    program.refuses("data", "pack", "photos", "file", names=("file: is a file",))
    program.refuses("data", "pack", "photos", "photos/out", names=("lies in the folder that is packed",))
    program.refuses("data", "pack", "photos/a.png", "out", names=("photos/a.png: is a file",))
    program.refuses("data", "pack", "nowhere", "out", names=("nowhere: no such file",))
    program.refuses("data", "pack", "photos", "out", "--shard-megabytes", "0", names=("'0'",))
    assert contents(Path("full")) == before
    assert not Path("out").exists()
    assert program("data", "pack", "photos", "out").code == 0
    make_photos(Path("photos"), ("a.png", "b.png", "c.png"))
    program.refuses("data", "pack", "photos", "out", names=("out: was begun with pictures 2, not 3",))
    Path("photos/gone.png").symlink_to("nothing")
    program.refuses("data", "pack", "photos", "out2", names=("photos/gone.png: cannot be read",))


def test_packing_refuses_what_readers_would_pass_over(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(Path("photos"), ("a.png", "b:1.png"))
    program.refuses("data", "pack", "photos", "out", names=("photos/b:1.png: would be lost", "lead out of the archive"))
    Path("photos/b:1.png").unlink()
    monkeypatch.setattr("softvq.data.tar_index.MAX_FILE_BYTES", 10)
    program.refuses("data", "pack", "photos", "out", names=("photos/a.png: would be lost", "members above"))
    assert not Path("out").exists()


def test_who_comes_second_does_not_pack_over_the_first(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(Path("first"), ("a.png", "b.png"))
    make_photos(Path("second"), ("c.png",))
    lock = packing.folder_lock

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        pack_folder(first, out, SMALL)
        return lock(*arguments, **options)

    first, second, out = (Path(name).absolute() for name in ("first", "second", "out"))
    monkeypatch.setattr(packing, "folder_lock", late)
    with pytest.raises(InputError, match="was begun with pictures 2, not 1"):
        pack_folder(second, out, SMALL)
    assert list(open_source(out).names) == ["a.png", "b.png"]


def test_a_manifest_of_something_else_is_let_be(program: Program) -> None:
    write_tar(Path("shards/a.tar"), [("a.png", picture())])
    for text in ('{"files": 3}', '["a.tar"]', '{"format": "softvq-shards-1"}'):
        Path("shards/manifest.json").write_text(text)
        assert program("data", "check", "shards").code == 0


def test_more_workers_than_any_machine_has_use_for_are_refused(program: Program) -> None:
    make_photos(Path("photos"), ("a.png",))
    program.refuses("data", "check", "photos", "--workers", 257, names=("workers is 257, expected 0 to 256",))


def test_a_full_disk_leaves_nothing_half(program: Program) -> None:
    make_photos(Path("photos"), ("a.png", "b.png"))
    with full_disk(4096):
        result = program("data", "pack", "photos", "out")
    assert result.code == 3
    assert "shard-000000.tar: cannot be written" in result.err
    assert set(contents(Path("out"))) == {"manifest.json"}
    assert program("data", "pack", "photos", "out").code == 0


def test_a_check_finds_shards_that_are_not_as_they_were_written(program: Program) -> None:
    make_photos(Path("photos"), tuple(f"{i}.png" for i in range(6)))
    out = Path("out")
    pack_folder("photos", out, SMALL)
    assert program("data", "check", out).code == 0
    shard = out / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")  # within the zeros at the end, which no reader looks at
    names = ("1 of its shards", "shard-000001.tar: is not as it was written, its SHA-256 differs")
    result = program("data", "check", out, "--json")
    assert result.code == 2
    assert all(name in result.err for name in names)
    assert len(json.loads(result.out)["damaged_shards"]) == 1
    shard.write_bytes(whole)
    (out / "other.tar").write_bytes(whole)
    result = program("data", "check", out)
    assert (result.code, "other.tar: is not in manifest.json" in result.err) == (2, True)
    (out / "other.tar").unlink()
    shard.unlink()
    program.refuses("data", "check", out, names=("shard-000001.tar: no such shard",))


def test_commands_take_shards_for_the_folder(program: Program) -> None:
    make_photos(Path("photos"), tuple(f"{'ab'[i % 2]}/{i}.png" for i in range(6)))
    pack_folder("photos", "shards", SMALL)
    make_model(Path("model"))
    recipe = write_recipe(Path("recipe.yaml"), train__steps=3, train__save_every=2)
    for data in ("photos", "shards"):
        assert program("train", "tokenizer", "--config", recipe, "--data", data, "--run", f"run-{data}").code == 0
        assert program("cache-latents", "model", data, f"cache-{data}").code == 0
        evaluate = ["evaluate", "reconstruction", "model", data, "--perceptual", "none", "--out", f"figures-{data}"]
        assert program(*evaluate, "--size", 32).code == 0
    first, second = ([{**json.loads(line), "clock": None} for line in each] for each in _logs())
    assert first == second
    for name in ("latents-00000.safetensors", "cache.json"):
        assert Path("cache-photos", name).read_bytes() == Path("cache-shards", name).read_bytes()
    assert Path("figures-photos/images.csv").read_bytes() == Path("figures-shards/images.csv").read_bytes()
    # a run that was begun on the folder goes on with the shards
    shutil.rmtree("run-photos/checkpoints/step-00000003")
    resumed = program("train", "tokenizer", "--config", recipe, "--data", "shards", "--run", "run-photos", "--resume")
    assert resumed.code == 0, resumed.err
    weights = [Path(f"run-{data}/tokenizer/model.safetensors").read_bytes() for data in ("photos", "shards")]
    assert weights[0] == weights[1]


def _logs() -> list[list[str]]:
    return [Path(f"run-{data}/log.jsonl").read_text().splitlines() for data in ("photos", "shards")]


def test_a_photograph_is_the_same_from_either(program: Program) -> None:
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(picture(3, "JPEG"))
    Path("photos/b.webp").write_bytes(encoded(photograph(50, 60), "WEBP"))
    assert program("data", "pack", "photos", "shards").code == 0
    folder, shards = open_source("photos"), open_source("shards")
    assert [folder.image(i, 10**6).tobytes() for i in (0, 1)] == [shards.image(i, 10**6).tobytes() for i in (0, 1)]
