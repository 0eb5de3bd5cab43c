from pathlib import Path

import pytest
import torch

from softvq.data.folder import DataConfig, PhotoFolder, batches
from softvq.data.hub_images import _parquet
from softvq.data.images import read_image
from softvq.data.sources import fingerprint_of, open_source
from softvq.errors import InputError
from tests.program import Program, write_recipe
from tests.shards import picture

datasets = pytest.importorskip("datasets")

# from Python 3.12 on, and of no concern to processes that only decode
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LABELS = [2, 0, 1, 0, 2, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a table in every form; the picture of the last row is spoilt."""
    root = tmp_path_factory.mktemp("hub")
    pictures = [{"bytes": picture(seed), "path": f"{seed}.png"} for seed in range(len(LABELS))]
    pictures[-1] = {"bytes": b"spoilt", "path": "x.png"}
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["ant", "bee", "cat", "dog"]),
            "plain": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "weight": datasets.Value("float32"),
        }
    )
    columns = {"id": list(range(6)), "picture": pictures, "label": LABELS, "plain": LABELS}
    table = datasets.Dataset.from_dict(
        {**columns, "text": [f"c{label}" for label in LABELS], "weight": [0.5] * 6}, features=features
    )
    table.save_to_disk(root / "disk")
    datasets.DatasetDict({"train": table, "val": table.select([0, 1])}).save_to_disk(root / "splits")
    (root / "parquet/data").mkdir(parents=True)
    table.to_parquet(root / "parquet/data/train-00000-of-00002.parquet")
    table.select([1, 2]).to_parquet(root / "parquet/data/test-00000-of-00001.parquet")
    paths = [{"bytes": None, "path": str(root / "outside.png")}, None]
    (root / "outside.png").write_bytes(picture(0))
    rows = datasets.Features({"picture": datasets.Image()}).arrow_schema
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"picture": each} for each in paths], schema=rows), root / "paths.parquet")
    table.remove_columns("picture").save_to_disk(root / "no-images")
    return root


@pytest.mark.parametrize(
    "where", ["disk", "splits", "splits:train", "parquet", "parquet/data/train-00000-of-00002.parquet:train:picture"]
)
def test_every_form_gives_the_rows_in_order(made: Path, where: str) -> None:
    source = open_source(f"hf:{made}/{where}")
    assert list(source.names) == [str(row) for row in range(6)]
    assert (source.classes, source.labels) == (["ant", "bee", "cat", "dog"], LABELS)
    assert list(source.sizes()) == [*(len(picture(seed)) for seed in range(5)), 6]
    for row in range(5):
        assert source.image(row, 10**6).tobytes() == read_image(picture(row)).tobytes()
    with pytest.raises(InputError, match=f"hf:{made}/{where}: row 5: is not a JPEG, PNG or WebP"):
        source.image(5, 10**6)
    assert fingerprint_of(source) == fingerprint_of(open_source(f"hf:{made}/disk"))


def test_splits_and_columns_can_be_chosen(made: Path) -> None:
    assert len(open_source(f"hf:{made}/splits:val").names) == 2
    assert len(open_source(f"hf:{made}/parquet:test").names) == 2
    source = open_source(f"hf:{made}/disk::picture:plain")
    assert (source.classes, source.labels) == (["0", "1", "2"], LABELS)
    source = open_source(f"hf:{made}/disk:::text")
    assert (source.classes, source.labels) == (["c0", "c1", "c2"], LABELS)
    others = {fingerprint_of(open_source(f"hf:{made}/disk{fields}")) for fields in ("", ":::plain", ":::text")}
    assert len(others) == 3


@pytest.mark.parametrize("split", ["train", "test", "train_extra", None])
def test_splits_whose_names_begin_alike_are_apart(made: Path, tmp_path: Path, split: str | None) -> None:
    whole = {"train": ["train-00000-of-00002-a09b74b3ef9c3b56", "train/0001"], "test": ["test"]}
    whole |= {"train_extra": ["train_extra-00000-of-00001", "train_extra_2"], "training": ["training"]}
    for stems in whole.values():
        for stem in stems:
            (tmp_path / stem).parent.mkdir(exist_ok=True)
            (tmp_path / f"{stem}.parquet").touch()
    found = {path.relative_to(tmp_path).as_posix().removesuffix(".parquet") for path in _parquet(tmp_path, split)}
    assert found == set(whole[split or "train"])
    assert _parquet(tmp_path, "trai") == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers_ranks_or_where_they_begin(made: Path, num_workers: int) -> None:
    def listed(start: int, rank: int, world_size: int, workers: int) -> list[torch.Tensor]:
        folder = PhotoFolder(f"hf:{made}/disk", 16, DataConfig(max_bad_fraction=0.5), seed=1)
        return [batch.images for batch in batches(folder, 4, start, 5 - start, workers, rank, world_size)]

    whole = listed(0, 0, 1, 0)
    ranks = [listed(2, rank, 2, num_workers) for rank in range(2)]
    assert all(torch.equal(torch.cat(parts), one) for *parts, one in zip(*ranks, whole[2:], strict=True))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("", "expected hf:NAME"),
        ("disk:a:b:c:d", "expected hf:NAME"),
        ("splits:test", "has no split 'test', expected one of train, val"),
        ("disk::nothing", "has no column 'nothing', expected one of picture"),
        ("disk::text", "the column 'text' holds no images; those of images are picture"),
        ("disk:::nothing", "has no column 'nothing'"),
        ("disk:::weight", "holds neither numbers of classes nor their names"),
        ("no-images", "has no column of images, but id"),
        ("nowhere", "no such folder, and no name of a repository"),
    ],
)
def test_what_cannot_be_used_is_told(made: Path, where: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_source(f"hf:{made / where}" if where else "hf:")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set_and_a_hub_without_network(made: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    for name in (str(tmp_path), "someone/nothing-of-this-name"):
        with pytest.raises(InputError, match="is no data set that can be opened here") as caught:
            open_source(f"hf:{name}")
        assert "\n" not in str(caught.value)


def test_a_table_cannot_name_files_of_this_machine(made: Path) -> None:
    source = open_source(f"hf:{made}/paths.parquet")
    assert list(source.sizes()) == [-1, -1]
    for row in range(2):
        with pytest.raises(InputError, match=f"row {row}: has no picture in it"):
            source.image(row, 10**6)


def test_without_datasets_the_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets, which is not installed; pip install 'softvq\[data\]'"):
        open_source(f"hf:{made}/disk")


def test_a_tokenizer_is_trained_on_a_table(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    program = Program(capsys)
    recipe = write_recipe(Path("recipe.yaml"), data__max_bad_fraction=0.5)
    result = program("train", "tokenizer", "--config", recipe, "--data", f"hf:{made}/disk", "--run", "run")
    assert result.code == 0, result.err
    assert Path("run/tokenizer/model.safetensors").is_file()
