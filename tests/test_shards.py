import dataclasses
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softvq.data import shards as module
from softvq.data.folder import Batch, DataConfig, PhotoFolder, batches
from softvq.data.latent_cache import CachePlan
from softvq.data.latent_writer import write_cache
from softvq.data.packing import pack_folder
from softvq.data.shards import INDEX_SUFFIX, open_shards
from softvq.data.sources import FolderSource, fingerprint_of, open_source
from softvq.data.tar_index import Texts
from softvq.errors import InputError, RunError
from tests.shards import picture, write_tar

# from Python 3.12 on, and of no concern to processes that only decode
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NAMES = [f"{'cat' if i % 3 else 'ant'}/{i}.png" for i in range(9)] + ["cat/deep/er/10.PNG", "ant/sp ace.é.1.png"]
COUNT = len(NAMES) + 1  # with one that is spoilt


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    (tmp_path / "photos/ant/1.png").write_bytes(b"spoilt")
    return tmp_path / "photos"


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    made = pack_folder(photos, tmp_path / "shards", 10240)
    assert made.shards == 5, made
    return tmp_path / "shards"


def listed(where: Path | str, **options: int) -> list[Batch]:
    chosen = {"batch_size": 4, "start_step": 0, "num_steps": 7, "num_workers": 0} | options
    return list(batches(PhotoFolder(where, 16, DataConfig(max_bad_fraction=0.5), seed=3), **chosen))


def newer(path: Path) -> None:
    """Make a file newer than its index by more than the clock's grain."""
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Batch):
            mine, yours = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(mine, yours) if isinstance(mine, torch.Tensor) else mine == yours, field.name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_give_the_batches_of_the_folder(photos: Path, packed: Path, num_workers: int) -> None:
    whole = listed(photos)
    assert {name for batch in whole for name in batch.skipped} == {"ant/1.png"}
    assert_same(listed(packed, num_workers=num_workers), whole)
    for start in (1, 5):  # as a run that is resumed asks for them
        assert_same(listed(packed, start_step=start, num_steps=7 - start, num_workers=num_workers), whole[start:])
    for world_size in (2, 4):
        ranks = [listed(packed, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            joined = torch.cat([rank[step].images for rank in ranks])
            assert torch.equal(joined, batch.images)


def test_shards_are_the_set_that_the_folder_is(photos: Path, packed: Path) -> None:
    folder, shards = open_source(photos), open_source(packed)
    assert list(shards.names) == list(folder.names)
    assert (shards.classes, shards.labels) == (folder.classes, folder.labels) == (["ant", "cat"], folder.labels)
    assert list(shards.sizes()) == list(folder.sizes())
    assert fingerprint_of(shards) == fingerprint_of(folder)
    assert shards.remarks == []
    (photos / "ant/0.png").write_bytes(picture(99))
    assert fingerprint_of(open_source(photos)) != fingerprint_of(shards)


def test_any_other_reader_finds_the_photographs(photos: Path, packed: Path) -> None:
    found = {}
    for path in sorted(packed.glob("*.tar")):
        assert path.stat().st_size <= 10240
        with tarfile.open(path) as archive:
            for each in archive:
                assert (each.isreg(), each.mtime, each.uid, each.uname) == (True, 0, 0, "")
                found[each.name] = archive.extractfile(each).read()
    assert list(found) == list(FolderSource(photos).names)
    assert all((photos / name).read_bytes() == data for name, data in found.items())


def test_one_shard_a_pattern_and_a_url_are_the_same(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(open_source(packed).names)
    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    monkeypatch.setattr(module, "index_of", None)  # all find the index that was packed
    places = [packed / "*.tar", packed / "shard-{000000..000004}.tar", "memory://bucket", "memory://bucket/*.tar"]
    for where in [*map(str, places), "memory://bucket/shard-{000000..000004}.tar"]:
        assert list(open_source(where).names) == whole, where
    one = [list(open_source(path).names) for path in sorted(packed.glob("*.tar"))]
    assert [name for names in one for name in names] == whole
    assert_same(listed("memory://bucket", num_steps=2), listed(packed, num_steps=2))
    with pytest.raises(InputError, match=r"memory://bucket/shard-000005.tar: no such shard"):
        open_source("memory://bucket/shard-{000004..000005}.tar")
    memory.rm("/bucket", recursive=True)


def test_an_index_is_made_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{seed}.png", picture(seed)) for seed in range(5)])
    shutil.copy(path, tmp_path / "b.tar")
    Path(f"{tmp_path}/b.tar{INDEX_SUFFIX}").mkdir()  # where nothing can be written
    fsspec.filesystem("memory").pipe("/c/c.tar", path.read_bytes())
    where = [str(path), str(tmp_path / "b.tar"), "memory://c/c.tar"]
    first = [list(open_shards(each).names) for each in where]
    assert first[0] == first[1] == first[2] == [f"{seed}.png" for seed in range(5)]
    assert Path(f"{path}{INDEX_SUFFIX}").is_file()
    assert len(list(cache.rglob(f"*{INDEX_SUFFIX}"))) == 2
    monkeypatch.setattr(module, "index_of", None)
    assert [list(open_shards(each).names) for each in where] == first


def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{seed}.png", picture(seed)) for seed in range(5)])
    index = Path(f"{path}{INDEX_SUFFIX}")
    whole = list(open_shards(str(path)).names)
    bytes_of_it = index.read_bytes()
    for cut in range(0, len(bytes_of_it), 41):
        index.write_bytes(bytes_of_it[:cut])
        assert list(open_shards(str(path)).names) == whole
        assert index.read_bytes() == bytes_of_it
    other = write_tar(tmp_path / "other.tar", [(f"{seed}.png", picture(seed)) for seed in (4, 3, 2, 1, 0)])
    size = path.stat().st_size
    other.replace(path)
    os.utime(path, (0, 0))  # as if it were older than the index
    assert path.stat().st_size == size
    assert list(open_shards(str(path)).names) == whole[::-1]


@pytest.mark.parametrize("told", [{"ETag": "1"}, {"LastModified": 1}, {"mtime": 1.5}])
def test_labels_of_a_shard_that_changed_on_its_server_are_read_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, object]
) -> None:
    """The same pictures at the same places in as many bytes, so that nothing but the server's word tells."""
    memory = fsspec.filesystem("memory")
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda *given, **more: {**info(*given, **more), **told, "created": 0})
    for label in (b"3", b"5"):
        path = write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.cls", label)])
        memory.pipe("/labels/a.tar", path.read_bytes())
        told = {name: f"{value}0" for name, value in told.items()}
        for _ in range(2):
            assert open_shards("memory://labels").labels == [int(label)]
        assert len(list(cache.rglob(f"*{INDEX_SUFFIX}"))) == 1
    memory.rm("/labels", recursive=True)


def test_a_shard_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{seed}.png", picture(seed)) for seed in range(3)])
    source = open_shards(str(path))
    write_tar(path, [(f"{seed}0.png", picture(seed)) for seed in range(3)])
    with pytest.raises(InputError, match=r"a.tar: 1.png: is not where its index says"):
        source.image(1, 10**6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_photograph_that_the_network_loses_stops_the_run(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe(f"/lost/{path.name}", path.read_bytes())
    folder = PhotoFolder("memory://lost", 16, DataConfig(max_bad_fraction=0.9), seed=3)
    source = folder.source

    def cut_off(*_: object) -> bytes:
        raise InputError("memory://lost: cannot be read (timed out); check the address and the network")

    monkeypatch.setattr(module, "_read", cut_off)
    with pytest.raises(RunError, match=r"^memory://lost: cannot be read \(timed out\)"):
        source.image(0, 10**6)
    with pytest.raises(RunError, match=r"^memory://lost: cannot be read \(timed out\)"):
        next(batches(folder, 4, 0, 1, num_workers))
    plan = CachePlan(tokenizer="m", fingerprint="a" * 64, tokens=4, dim=2, softvq_version="1")
    with pytest.raises(RunError, match=r"^memory://lost: cannot be read \(timed out\)"):
        write_cache(tmp_path / "cache-of-it", folder, plan, lambda images: images, num_workers=num_workers)
    memory.rm("/lost", recursive=True)


LABELLED = {
    "numbers": ([("0.cls", b"2\n"), ("1.cls", b" 0")], ["0", "1", "2"], [2, 0]),
    "names": ([("0.cls", b"rose"), ("1.cls", "blé tendre".encode())], ["blé tendre", "rose"], [1, 0]),
    "json": ([("0.json", b'{"label": 1}'), ("1.json", b'{"label": 0, "x": []}')], ["0", "1"], [1, 0]),
    "json names": ([("0.json", b'{"label": "b"}'), ("1.json", b'{"label": "a"}')], ["a", "b"], [1, 0]),
    "cls before json": ([("0.cls", b"1"), ("0.json", b'{"label": 0}'), ("1.cls", b"0")], ["0", "1"], [1, 0]),
    "some": ([("0.cls", b"1")], ["0", "1"], [1, -1]),
    "none": ([("0.txt", b"a rose"), ("1.json", b'{"caption": "x"}')], [], [-1, -1]),
    "broken": ([("0.json", b"{"), ("1.json", b'{"label": true}')], [], [-1, -1]),
    "deep": ([("0.json", b"[" * 60000), ("1.json", b'{"label": -1}')], [], [-1, -1]),
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("suffix", ["png", "input.png"])
def test_labels_come_from_the_members_beside(tmp_path: Path, name: str, suffix: str) -> None:
    beside, classes, labels = LABELLED[name]
    path = write_tar(tmp_path / "a.tar", [(f"0.{suffix}", picture(0)), (f"1.{suffix}", picture(1)), *beside])
    source = open_shards(str(path))
    assert (source.classes, source.labels) == (classes, labels)


def test_names_of_classes_are_of_all_shards(tmp_path: Path) -> None:
    for number, name in enumerate("cab"):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.cls", name.encode()), (f"{number}.png", picture(number))])
    source = open_source(tmp_path)
    assert (source.classes, source.labels) == (["a", "b", "c"], [2, 0, 1])
    before = fingerprint_of(source)
    newer(write_tar(tmp_path / "2.tar", [("2.cls", b"z"), ("2.png", picture(2))]))
    assert fingerprint_of(open_source(tmp_path)) != before  # labels that no name tells count
    newer(write_tar(tmp_path / "2.tar", [("2.cls", b"7"), ("2.png", picture(2))]))
    with pytest.raises(InputError, match="numbers in some members and names in others"):
        open_source(tmp_path)


def test_names_that_stand_in_several_shards_get_the_shard_before_them(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("rose/0.png", picture(number)), ("tulip/1.png", picture(9))])
    source = open_source(tmp_path)
    assert list(source.names) == [f"{n}.tar/{name}" for n in range(2) for name in ("rose/0.png", "tulip/1.png")]
    assert (source.classes, source.labels) == (["rose", "tulip"], [0, 1, 0, 1])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=9), st.integers(-9, 9))
def test_texts_are_a_list_of_texts(texts: list[str], place: int) -> None:
    block = Texts.of(texts)
    assert (list(block), len(block), block[place:]) == (texts, len(texts), texts[place:])
    if -len(texts) <= place < len(texts):
        assert block[place] == texts[place]
    else:
        with pytest.raises(IndexError):
            block[place]


def test_the_manifest_tells_what_was_packed(packed: Path, photos: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["pictures"] == sum(shard["pictures"] for shard in manifest["shards"]) == COUNT
    assert manifest["fingerprint"] == PhotoFolder(photos, 16, DataConfig(), 0).fingerprint
