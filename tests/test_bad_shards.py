import gzip
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from softvq.data import tar_index
from softvq.data.packing import pack_folder
from softvq.data.shards import INDEX_SUFFIX, open_shards
from softvq.data.sources import open_source
from softvq.data.tar_index import index_of, read_index
from softvq.errors import InputError
from tests.program import Program, contents, make_photos, write_recipe
from tests.shards import member, picture, write_tar


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def refused(where: Path | str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_source(where)
    assert "\n" not in str(caught.value)


HOSTILE: list[tuple[str | tarfile.TarInfo, bytes, str | None]] = [
    ("good.png", picture(0), None),
    ("../up.png", picture(1), "names that lead out of the archive"),
    ("a/../../up.png", picture(1), "names that lead out of the archive"),
    ("/root.png", picture(1), "names that lead out of the archive"),
    ("C:\\up.png", picture(1), "names that lead out of the archive"),
    ("..\\up.png", picture(1), "names that lead out of the archive"),
    ("a//b.png", picture(1), "names that lead out of the archive"),
    (member("link.png", tarfile.SYMTYPE, "/etc/passwd"), b"", "links"),
    (member("hard.png", tarfile.LNKTYPE, "good.png"), b"", "links"),
    (member("disk.png", tarfile.BLKTYPE), b"", "devices, pipes or sparse files"),
    (member("zero.png", tarfile.CHRTYPE), b"", "devices, pipes or sparse files"),
    (member("pipe.png", tarfile.FIFOTYPE), b"", "devices, pipes or sparse files"),
    ("x" * 65536 + ".png", picture(1), "names that are too long"),
    ("good.png", picture(2), "names that stand twice"),
    (".hidden.png", picture(1), "hidden names"),
    ("__MACOSX/._good.png", picture(1), "hidden names"),
    (member("folder.png", tarfile.DIRTYPE), b"", None),
    ("good.cls", b"\xff\x00" * 10, "labels that cannot be read"),
    ("long.cls", b"a" * 100_000, "labels that cannot be read"),
    ("a/./b.png", picture(3), None),
    ("./c.png", picture(4), None),
    ("text.txt", b"no picture", None),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_what_is_no_key_or_no_file_is_passed_over_and_counted(here: Path, format: int) -> None:
    path = write_tar(here / "shards/a.tar", [(name, data) for name, data, _ in HOSTILE], format)
    source = open_shards(str(path))
    assert list(source.names) == ["good.png", "a/b.png", "c.png"]
    reasons = [reason for *_, reason in HOSTILE if reason]
    counted = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    assert source.remarks == [f"{path}: members were passed over: {counted}"]
    for index in range(3):
        source.image(index, 10**6)
    index = f"shards/a.tar{INDEX_SUFFIX}"
    assert set(contents(here)) == {"shards/a.tar", index}  # nothing else was written, here or elsewhere
    assert list(open_shards(str(path)).names) == list(source.names)  # now by the index


def test_sparse_members_are_passed_over(here: Path) -> None:
    entry = member("holes.png")
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    entry.pax_headers["GNU.sparse.name"] = "holes.png"
    path = write_tar(here / "a.tar", [("good.png", picture(0)), (entry, b"1\n0\n512\n".ljust(1024, b"\0"))])
    source = open_shards(str(path))
    assert list(source.names) == ["good.png"]
    assert "1 devices, pipes or sparse files" in source.remarks[0]


def holes(kind: str, size: int) -> bytes:
    """Return an archive with a sparse file whose list of holes is `size` bytes."""
    if kind == "old":  # in blocks after the header, each of which says that there is another
        header = bytearray(member("holes.png", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
        header[482] = 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        block = b"%011o\0%011o\0" % (1, 1) * 21 + b"\1" + bytes(7)
        return bytes(header) + block * (size // 512) + bytes(10240)
    entry = member("holes.png", size=size)  # as numbers, in lines, where the data begins
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.png"}
    return entry.tobuf(tarfile.PAX_FORMAT) + b"99999999\n" + b"1\n" * (size // 2) + bytes(10240)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_a_list_of_holes_without_end_takes_no_memory(here: Path, kind: str) -> None:
    """tarfile would make pairs of numbers of it, many times as large."""
    path = here / "holes.tar"
    path.write_bytes(holes(kind, 1 << 23))
    refused(path, "headers of more than 1,048,576 bytes before one member")


def test_an_archive_cut_short_anywhere_is_refused_or_whole(here: Path) -> None:
    whole = write_tar(here / "a.tar", [(f"{seed}.png", picture(seed)) for seed in range(3)])
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    path = here / "cut.tar"
    accepted, sentences = [], []
    for cut in sorted({*range(0, len(data), 160), *range(end - 3, end + 600)}):
        path.write_bytes(data[:cut])
        try:
            source = open_shards(str(path))
        except InputError as error:
            sentences.append(str(error))
            continue
        finally:
            Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)
        accepted.append(cut)
        assert list(source.names) == ["0.png", "1.png", "2.png"]
    assert accepted
    assert not [sentence for sentence in sentences if "\n" in sentence or "cut.tar" not in sentence]
    assert min(accepted) > end  # a block of zeros has to follow


def test_flipped_bytes_raise_nothing_but_one_sentence(here: Path) -> None:
    entries = [("long/" * 40 + f"{seed}.png", picture(seed)) for seed in range(3)]
    data = bytearray(write_tar(here / "a.tar", [*entries, ("0.cls", b"1")]).read_bytes())
    draw = random.Random(0)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    path, index = here / "flipped.tar", Path(f"{here}/flipped.tar{INDEX_SUFFIX}")
    sentences = []
    for _ in range(120):
        flipped = data.copy()
        flipped[draw.choice(headers) + draw.randrange(1024)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        index.unlink(missing_ok=True)
        try:
            source = open_shards(str(path))
            for number in range(len(source.names)):
                source.image(number, 10**6)
        except InputError as error:
            sentences.append(str(error))
    assert len(sentences) > 40
    assert not [sentence for sentence in sentences if "\n" in sentence or "flipped.tar" not in sentence]


def a_header(name: str, kind: bytes, size: int) -> bytes:
    entry = member(name, kind, size=size)
    return entry.tobuf(tarfile.GNU_FORMAT)


NO_ARCHIVE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "damaged tar archive or cut short"),
    "noise": (lambda: random.Random(0).randbytes(5000), "damaged tar archive or cut short"),
    "text": (lambda: b"<html>404 Not Found</html>\n" * 90, "damaged tar archive or cut short"),
    "gzip": (lambda: gzip.compress(bytes(20480)), "it is compressed, expected a plain .tar"),
    "huge name": (lambda: a_header("././@LongLink", b"L", 8 << 30), "a header of 8,589,934,592 bytes"),
    "huge pax": (lambda: a_header("x", tarfile.XHDTYPE, 8 << 30), "a header of 8,589,934,592 bytes"),
    "negative": (lambda: a_header("x", b"9", -5000) + bytes(2048), "damaged tar archive or cut short"),
    "beyond": (lambda: a_header("x.png", tarfile.REGTYPE, 1 << 40) + bytes(2048), "unexpected end of data"),
    "names of names": (lambda: (a_header("n", b"L", 2) + b"a".ljust(512, b"\0")) * 5000, "damaged tar archive"),
    "nothing": (lambda: bytes(10240), "no shard of it holds an image"),
}


@pytest.mark.parametrize("name", NO_ARCHIVE)
def test_what_is_no_archive_is_told_in_a_sentence(here: Path, name: str) -> None:
    make, words = NO_ARCHIVE[name]
    (here / "a.tar").write_bytes(make())
    refused(here / "a.tar", words)


def test_limits_hold(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(here / "a.tar", [("0.png", picture(0)), ("1.png", bytes(9000)), ("2.png", picture(2))])
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 2)
    refused(path, "has more than 2 members")
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 3)
    refused(path, "has more than 3 members")  # since the end was not seen
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 9)
    monkeypatch.setattr(tar_index, "MAX_FILE_BYTES", 8999)
    assert list(open_shards(str(path)).names) == ["0.png", "2.png"]
    monkeypatch.setattr("softvq.data.shards.MAX_SHARD_BYTES", 100)
    refused(path, "expected at most 100; pack smaller shards")


def test_many_small_members_take_little(here: Path) -> None:
    """`benchmarks/data_reading.py --members 1000000` is the long version."""
    import io
    import tracemalloc

    class Many(io.RawIOBase):
        """An archive of empty pictures, made where it is read."""

        def __init__(self, count: int) -> None:
            self.count, self.place = count, 0

        def seek(self, place: int, whence: int = 0) -> int:
            self.place = place
            return place

        def tell(self) -> int:
            return self.place

        def read(self, size: int = -1) -> bytes:
            number, rest = divmod(self.place, 512)
            self.place += size
            block = a_header(f"{number:09d}.png", tarfile.REGTYPE, 0) if number < self.count else bytes(512)
            return block[rest : rest + size]

    count = 2_000
    tracemalloc.start()
    index = index_of(Many(count), (count + 2) * 512, "many")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(index.names[:2]) == ["000000000.png", "000000001.png"]
    assert len(index.names) == count
    assert peak < 1000 * count  # bytes for each


def test_an_index_with_numbers_out_of_bounds_is_not_used(here: Path) -> None:
    import safetensors.torch as safe

    path = write_tar(here / "a.tar", [(f"{seed}.png", picture(seed)) for seed in range(3)])
    open_shards(str(path))
    index = Path(f"{path}{INDEX_SUFFIX}")
    size = path.stat().st_size
    good = safe.load_file(index)
    with safe.safe_open(index, "pt") as file:
        header = file.metadata()
    assert read_index(index, size) is not None
    assert read_index(index, size + 512) is None
    wrong = {"offsets": -512, "sizes": 1 << 40, "labels": -3, "name_ends": 1 << 40, "headers": None}
    for name, value in wrong.items():
        changed = {key: tensor.clone() for key, tensor in good.items()}
        if value is None:
            changed[name] = changed[name][:2].clone()
        else:
            changed[name][1] = value
        safe.save_file(changed, index, header)
        assert read_index(index, size) is None, name
        assert len(open_shards(str(path)).names) == 3
    counts = [f'{{"shard_bytes": {size}, "passed_over": {{"x": {each}}}}}' for each in ("1e999", "-5", "1" * 99, '"7"')]
    for text in ("[", "[]", "{}", '{"shard_bytes": 1}', '{"passed_over": 3}', "[" * 9999, *counts):
        safe.save_file(good, index, {next(iter(header)): text})
        assert read_index(index, size) is None


def test_missing_and_unfinished_shards(here: Path) -> None:
    make_photos(here / "photos", tuple(f"{number}.png" for number in range(9)))
    pack_folder(here / "photos", here / "shards", 20480)
    out = here / "shards"
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "shard-000001.tar").rename(out / "elsewhere")
    refused(out, r"shards/shard-000001.tar: no such shard; fetch it")
    refused(here / "shards/shard-{000000..000001}.tar", r"shard-000001.tar: no such shard; fetch it")
    (out / "elsewhere").rename(out / "shard-000001.tar")
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    refused(out, "its packing is not finished")
    for name in ("../up.tar", "/etc/passwd", 3, None):
        (out / "manifest.json").write_text(json.dumps({**manifest, "shards": [{"file": name}]}))
        refused(out, "names a shard")
    (out / "manifest.json").write_text("[")  # not ours: what lies there counts
    assert len(open_source(out).names) == 9


def test_places_that_hold_no_shards(here: Path) -> None:
    (here / "a.tar").mkdir()
    refused(here / "a.tar", "holds no image")
    refused(here / "b.tar", "b.tar: no such shard")
    refused(here / "*.tar.tar", "there is no .tar shard")
    refused(here / "**.tar", "there is no .tar shard")  # pathlib knows no such pattern
    refused(f"{here}/n*/b*.tar", "has a pattern in its folder")
    refused("x-{0..999999999}.tar", "means 1,000,000,000 shards")
    refused("x-{5..3}.tar", "means -1 shards")
    refused("x-{0..99999}-{0..9}.tar", "means more than 100,000 shards")
    refused("nosuch://bucket/a.tar", "nosuch://bucket/a.tar: cannot be")
    refused("memory://nowhere", "there is no .tar shard")
    refused("s3://bucket/a.tar", "s3://bucket/a.tar: cannot be opened here .*s3fs.*; install that package")
    make_photos(here / "both", ("a/a.png",))
    write_tar(here / "both/a.tar", [("a.png", picture(0))])
    refused(here / "both", "holds both tar shards and images")


def test_a_run_on_shards_ends_in_one_sentence(here: Path, program: Program) -> None:
    recipe = write_recipe(Path("recipe.yaml"))
    (here / "s").mkdir()
    (here / "s/a.tar").write_bytes(b"spoilt" * 999)
    program.refuses("train", "tokenizer", "--config", recipe, "--data", here / "s", "--run", "run", names=("a.tar",))
    write_tar(here / "s/a.tar", [(f"{seed}.png", b"spoilt") for seed in range(4)])
    arguments = ("train", "tokenizer", "--config", recipe, "--data", here / "s", "--run", "run2")
    result = program(*arguments)
    assert result.code == 3
    assert "none of its 4 images can be read" in result.err.splitlines()[-1]


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)
