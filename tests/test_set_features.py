"""What networks see in a set is the same for any batch size, order, container, worker and number of processes."""

import dataclasses
import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softvq.errors import InputError
from softvq.evaluation import set_features as module
from softvq.evaluation.adm_statistics import adm_statistics, is_adm_statistics, with_images
from softvq.evaluation.extractors import Extractor, extractor
from softvq.evaluation.image_sets import ImageSet, in_memory, open_images, pixel_fingerprint
from softvq.evaluation.set_features import SetFeatures, set_features
from softvq.evaluation.set_figures import set_figures
from softvq.training import distributed
from tests.looking import DIM, PLACES, SIDE, inception, network, pictures, save_folder, save_npz
from tests.ranks import run_as_ranks

COUNT = 90
REFERENCE = pictures(70, seed=1)
LOOK = network()


@pytest.fixture(scope="module")
def tiny() -> Extractor:
    return extractor("timm:test_convnext", pretrained=False, image_size=32)


def features_of(pixels: Tensor, look: Extractor = LOOK, **options: Any) -> SetFeatures:
    return set_features(in_memory(pixels, "pictures"), [look], **options)[0]


def figures_of(found: SetFeatures, look: Extractor = LOOK) -> dict[str, float]:
    return set_figures(features_of(REFERENCE, look), found, look).values


def tensors_of(found: SetFeatures) -> dict[str, Tensor]:
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(found: SetFeatures, expected: SetFeatures, relative: float = 0.0) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=relative, atol=relative, msg=name)
    assert (found.pixels, found.count, found.distinct) == (expected.pixels, expected.count, expected.distinct)


def test_moments_are_those_of_numpy_and_features_lie_in_order() -> None:
    pixels = pictures(COUNT)
    found = features_of(pixels, batch_size=7)
    features, logits, spatial = LOOK.network(pixels)
    assert found.features is not None
    assert found.logits is not None
    torch.testing.assert_close(found.features, features, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-6, atol=1e-6)
    for table, mean, covariance in (
        (features, found.mean, found.covariance),
        (spatial, found.spatial_mean, found.spatial_covariance),
    ):
        assert mean is not None
        assert covariance is not None
        assert covariance.dtype == torch.float64
        np.testing.assert_allclose(mean, table.double().mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(covariance, np.cov(table.double(), rowvar=False), rtol=1e-6, atol=1e-7)
    assert (found.count, found.statistics_count, found.size, found.statistics) == (COUNT, COUNT, (SIDE, SIDE), None)
    (batch,) = in_memory(pixels, "pictures").batches(COUNT)
    assert found.pixels == pixel_fingerprint(batch.digests)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_change_no_figure(batch_size: int, tiny: Extractor) -> None:
    pixels = pictures(COUNT, side=32)
    whole = features_of(pixels, tiny, batch_size=COUNT)
    parts = features_of(pixels, tiny, batch_size=batch_size)
    reference = features_of(pictures(80, seed=2, side=32), tiny)
    ours, theirs = (set_figures(reference, found, tiny).values for found in (parts, whole))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert whole.pixels == parts.pixels


def test_spatial_features_are_counted_in_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = features_of(pictures(COUNT))
    monkeypatch.setattr(module, "SPATIAL_ROWS", 10)
    assert_same(features_of(pictures(COUNT), batch_size=4), whole, relative=1e-6)


@pytest.mark.parametrize("container", ["folder", "npz"])
@pytest.mark.parametrize("workers", [0, 2])
def test_containers_and_workers_change_nothing(container: str, workers: int, tmp_path: Path) -> None:
    pixels = pictures(COUNT)
    path = save_folder(tmp_path / "x", pixels) if container == "folder" else save_npz(tmp_path / "x.npz", pixels)
    found = set_features(open_images(path), [LOOK], workers=workers)[0]
    assert_same(found, features_of(pixels))


def test_the_order_of_images_changes_no_figure() -> None:
    pixels = pictures(COUNT)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    one, other = features_of(pixels), features_of(pixels[order])
    assert one.features is not None
    assert other.features is not None
    assert not torch.equal(one.features, other.features)
    assert one.pixels == other.pixels
    ours, theirs = figures_of(one), figures_of(other)
    assert "inception_score" in ours
    assert "kernel_distance" in ours
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_copies_are_counted() -> None:
    pixels = pictures(10)
    assert features_of(pixels).distinct == 10
    assert features_of(torch.cat([pixels, pixels[:3]])).distinct == 10


class Hands(nn.Module):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.asked = network().network, 0

    def forward(self, pixels: Tensor) -> Any:
        self.asked += len(pixels)
        return self.inner(pixels)


def test_one_pass_serves_all_networks_and_says_how_far_it_is() -> None:
    reads: list[int] = []
    images = in_memory(pictures(20), "pictures")

    def counted(start: int, stop: int) -> Any:
        for item in images.items(start, stop):
            reads.append(1)
            yield item

    looks = [network(name="one", network=Hands()), network(name="two", network=Hands())]
    steps: list[int] = []
    places: list[int] = []
    found = set_features(
        dataclasses.replace(images, items=counted),
        looks,
        batch_size=8,
        progress=steps.append,
        keep=lambda batch: places.extend(batch.places.tolist()),
    )
    assert [each.extractor for each in found] == ["one", "two"]
    assert [look.network.asked for look in looks] == [20, 20]
    assert (len(reads), steps, places) == (20, [8, 8, 4], list(range(20)))


def test_without_networks_it_is_a_pass_for_its_own_sake() -> None:
    names: list[str] = []
    assert set_features(in_memory(pictures(1), "one"), [], keep=lambda batch: names.extend(batch.names)) == []
    assert names == ["000000"]


def test_files_are_read_beside_and_images_are_made_in_the_caller(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "x.npz", pictures(20))
    where: dict[str, set[int]] = {}
    for images in (open_images(path), in_memory(pictures(20), "memory")):

        def items(start: int, stop: int, images: ImageSet = images) -> Any:
            where.setdefault(images.kind, set()).add(threading.get_ident())
            yield from images.items(start, stop)

        set_features(dataclasses.replace(images, items=items), [LOOK], batch_size=6)
    assert where["memory"] == {threading.get_ident()}
    assert len(where["npz"]) == 1
    assert where["npz"].isdisjoint(where["memory"])


def test_a_damaged_file_is_named_and_no_thread_stays(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "x", pictures(12))
    (folder / "0007.png").write_bytes(b"\x89PNG nonsense")
    before = threading.active_count()
    with pytest.raises(InputError, match=r"0007\.png"):
        set_features(open_images(folder), [LOOK], batch_size=2)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_who_breaks_off_leaves_no_thread(workers: int, tmp_path: Path) -> None:
    images = open_images(save_folder(tmp_path / "x", pictures(40)))
    before = threading.active_count()

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        set_features(images, [LOOK], batch_size=2, workers=workers, progress=stop)
    assert threading.active_count() == before


class Waits(TorchDispatchMode):
    """Counts where the host asks for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_as_often_for_many_batches_as_for_one() -> None:
    counts = []
    for batch_size in (1, 40):
        with Waits() as waits:
            features_of(pictures(40), batch_size=batch_size)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


def test_features_that_are_not_finite_name_the_set() -> None:
    for broken in ("features", "spatial"):
        look = network()
        look.network.get_buffer(broken).fill_(float("nan"))
        with pytest.raises(InputError, match=r"^pictures: Products finds .* not finite; [^.]*$"):
            features_of(pictures(5), look)


def test_one_image_is_no_set() -> None:
    with pytest.raises(InputError, match="pictures: holds 1 image, expected at least 2"):
        features_of(pictures(1))


def look_as_rank(folder: Path) -> None:
    distributed.join(torch.device("cpu"))
    try:
        for count in (2, 3, COUNT + 1):
            found = features_of(pictures(count), batch_size=7)
            values = figures_of(found)
            torch.save((tensors_of(found), found.pixels, values), f"{folder}/{count}-{distributed.dist.get_rank()}.pt")
    finally:
        distributed.leave()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    run_as_ranks(look_as_rank, tmp_path)
    for count in (2, 3, COUNT + 1):
        alone = features_of(pictures(count), batch_size=7)
        for rank in range(2):
            tensors, pixels, values = torch.load(tmp_path / f"{count}-{rank}.pt")
            assert pixels == alone.pixels
            for name, tensor in tensors_of(alone).items():
                torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
            assert values == pytest.approx(figures_of(alone), rel=1e-6)


def statistics(**changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    clouds = {"": random.normal(size=(50, DIM)), "_s": random.normal(size=(50, PLACES))}
    found = {f"mu{end}": cloud.mean(0) for end, cloud in clouds.items()}
    found |= {f"sigma{end}": np.cov(cloud, rowvar=False) for end, cloud in clouds.items()}
    return {name: value for name, value in (found | changes).items() if value is not None}


def saved(path: Path, **changes: Any) -> Path:
    np.savez(path / "x.npz", **statistics(**changes))
    return path / "x.npz"


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4"])
def test_statistics_of_adm_are_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    expected = {name: value.astype(dtype) for name, value in statistics().items()}
    expected["sigma_s"] = np.asfortranarray(expected["sigma_s"])
    path = saved(tmp_path, **expected)
    found = adm_statistics(path, LOOK)
    read = (found.mean, found.covariance, found.spatial_mean, found.spatial_covariance)
    for tensor, name in zip(read, ("mu", "sigma", "mu_s", "sigma_s"), strict=True):
        assert tensor is not None
        assert tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor, expected[name].astype(float), rtol=1e-6, atol=1e-7)
    assert (found.count, found.size, found.pixels, found.features) == (0, None, None, None)
    expected["sigma"][0, 1] *= 1 + 1e-6  # as float32 leaves it
    sigma = adm_statistics(saved(tmp_path, **expected), LOOK).covariance
    assert torch.equal(sigma, sigma.T)
    assert is_adm_statistics(path)


def test_statistics_have_a_fingerprint_of_their_own(tmp_path: Path) -> None:
    def fingerprint(**changes: Any) -> str | None:
        return adm_statistics(saved(tmp_path, **changes), LOOK).statistics

    images = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    assert fingerprint() == fingerprint(arr_0=images) != fingerprint(mu=np.ones(DIM))


def test_images_beside_statistics_serve_precision(tmp_path: Path) -> None:
    images = pictures(30)
    path = saved(tmp_path, arr_0=images.permute(0, 2, 3, 1).numpy())
    alone = adm_statistics(path, LOOK)
    assert (alone.count, alone.size) == (30, (SIDE, SIDE))
    beside = set_features(open_images(path), [LOOK])[0]
    both = with_images(alone, beside)
    assert both.features is beside.features
    assert both.mean is alone.mean
    assert both.statistics == alone.statistics
    samples = features_of(pictures(20, seed=5))
    only, more = (set_figures(reference, samples, LOOK).values for reference in (alone, both))
    assert {"frechet_distance", "spatial_frechet_distance"} <= only.keys() < more.keys()
    assert "precision" not in only
    assert "recall" in more
    assert only.items() <= more.items()
    with pytest.raises(InputError, match="use one network for both"):
        with_images(alone, features_of(pictures(20), inception()))


def test_without_spatial_statistics_there_is_no_spatial_distance(tmp_path: Path) -> None:
    found = adm_statistics(saved(tmp_path, mu_s=None, sigma_s=None), LOOK)
    assert found.spatial_mean is None
    assert "spatial_frechet_distance" not in set_figures(found, features_of(pictures(20)), LOOK).values


ASYMMETRIC = np.eye(DIM) + np.triu(np.ones((DIM, DIM)), 1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sigma": ({"sigma": None}, "holds no sigma, expected mu, sigma, mu_s, sigma_s"),
    "half of the spatial": ({"mu_s": None}, "holds no mu_s"),
    "other dimensions": ({"mu": np.zeros(DIM + 1)}, rf"mu is float64 \[{DIM + 1}\], expected floats \[{DIM}\]"),
    "flat covariance": ({"sigma": np.ones(DIM * DIM)}, rf"sigma is float64 \[{DIM * DIM}\]"),
    "integers": ({"mu": np.zeros(DIM, np.int64)}, "mu is int64"),
    "complex": ({"mu": np.zeros(DIM, complex)}, "mu is complex128"),
    "pickles": ({"mu": np.array([None] * DIM)}, "mu is object"),
    "nan": ({"mu": np.full(DIM, np.nan)}, "mu holds numbers that are not finite"),
    "infinite": ({"sigma_s": np.full((PLACES, PLACES), np.inf)}, "sigma_s holds numbers that are not finite"),
    "not symmetric": ({"sigma": ASYMMETRIC}, "sigma is no covariance"),
    "negative": ({"sigma": -np.eye(DIM)}, "sigma is no covariance"),
    "images of floats": ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 is float64"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_statistics_that_are_none_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=rf"x\.npz: .*{message}") as caught:
        adm_statistics(saved(tmp_path, **changes), LOOK)
    assert "\n" not in str(caught.value)


def test_a_matrix_with_negative_eigenvalues_names_the_set(tmp_path: Path) -> None:
    sigma = np.full((DIM, DIM), 2.0) - np.eye(DIM)
    reference = adm_statistics(saved(tmp_path, sigma=sigma), LOOK)
    with pytest.raises(InputError, match=r"has no distance from .*x\.npz: cov_a has negative eigenvalues"):
        set_figures(reference, features_of(pictures(20)), LOOK)


def test_files_that_are_no_whole_archive_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    wrong = {"short": whole[: len(whole) // 2], "empty": b"", "flipped": whole.replace(b"NUMPY", b"NUMPX")}
    middle = whole.index(b"\n", whole.index(b"sigma.npy")) + 40
    wrong["checksum"] = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in wrong.values():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.npz: is no whole \.npz file"):
            adm_statistics(path, LOOK)
    assert not is_adm_statistics(tmp_path / "short.npz")
    path.write_bytes(wrong["short"])
    assert not is_adm_statistics(path)
    assert not is_adm_statistics(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        adm_statistics(tmp_path / "y.npz", LOOK)
    with pytest.raises(InputError, match="is a folder"):
        adm_statistics(tmp_path, LOOK)


def test_an_archive_that_holds_more_than_its_header_says_is_not_unfolded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(DIM))
    with zipfile.ZipFile(path) as archive:
        others = {name: archive.read(name) for name in archive.namelist() if name != "mu.npy"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in others.items():
            archive.writestr(name, data)
        archive.writestr("mu.npy", buffer.getvalue() + bytes(1 << 22))
    with pytest.raises(InputError, match=r"mu holds .* bytes, not what its shape says"):
        adm_statistics(path, LOOK)


def test_images_are_no_statistics(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "x.npz", pictures(3))
    assert not is_adm_statistics(path)
    with pytest.raises(InputError, match="holds no mu and no sigma, expected mu, sigma"):
        adm_statistics(path, LOOK)
