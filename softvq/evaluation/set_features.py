"""What networks see in a whole set of images: features, logits and moments, in one pass over any number of processes.

The pass is as fast as the networks: the next batch is read while this one is looked at, all that is found stays on the
device in its place, and the host waits for nothing before the end.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.extractors import Extractor, Looked
from softvq.evaluation.image_sets import ImageBatch, ImageSet, pixel_fingerprint
from softvq.evaluation.moments import Moments
from softvq.evaluation.npz_images import ARRAY, MAX_HEADER_BYTES, open_npz
from softvq.ranks import rank, world_size

__all__ = ["SetFeatures", "adm_statistics", "is_adm_statistics", "set_features", "with_images"]

READ_AHEAD = 2
DIGEST_BYTES = 16
SPATIAL_ROWS = 1024
"""How many images' spatial features wait until they are counted in."""
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
ROUNDING = 1e-5
"""By so much of its largest entry a stored covariance may differ from its transpose: float32 does not hold more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SetFeatures:
    """What one network sees in a set; `set_features` or `adm_statistics` builds it. Tensors are on one device."""

    source: str
    """What the user gave."""
    count: int
    """Images in the set; beside stored statistics, those that are in the same file, which may be none."""
    size: tuple[int, int] | None
    """Height and width of each in pixels; None where there are only statistics."""
    pixels: str | None
    """The `pixel_fingerprint`; None where the images are not known."""
    extractor: str
    """The network's name."""
    extractor_sha256: str
    """Of its weights, as `Extractor` has it; of read statistics, that of the network they are taken to be of."""
    mean: Float[Tensor, " dim"]
    """Of the features, in float64."""
    covariance: Float[Tensor, "dim dim"]
    """With the divisor n - 1, in float64."""
    spatial_mean: Float[Tensor, " place"] | None
    """Of the spatial features; None where they are not known."""
    spatial_covariance: Float[Tensor, "place place"] | None
    """With the divisor n - 1."""
    features: Float[Tensor, "image dim"] | None
    """Float32, in order of place; None where there are only statistics."""
    logits: Float[Tensor, "image category"] | None
    """Float32, in order of place; None where the network has none."""
    statistics_count: int | None
    """Images behind mean and covariance, where that is known."""
    distinct: int | None = None
    """How many of the images differ from one another, where that is known."""
    order: Int64[Tensor, " _image"] | None = None
    """Places of the images in the order of their digests, so that what is drawn does not depend on how they lie."""
    crop: str = "none"
    """What was done to the images to get their size, as `ImageSet` says it."""
    statistics: str | None = None
    """SHA-256 of mean and covariance where they were read from a file of statistics; None where images gave them."""
    roots: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """Square roots of the covariances, which `set_figures` keeps for the next set that is compared with this one."""


@torch.no_grad()
def set_features(
    images: ImageSet,
    networks: Sequence[Extractor],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int], Any] | None = None,
    keep: Callable[[ImageBatch], Any] | None = None,
) -> list[SetFeatures]:
    """Look at every image of a set once, through all networks; over ranks, every rank must call it.

    Each rank looks at its own share. What comes back is whole and the same on every rank, and but for rounding the same
    for any batch size, number of ranks and container.

    Args:
        images: The set, of at least two.
        networks: On the devices where they compute; none is a pass for the sake of `keep`.
        batch_size: Images at once, >= 1.
        workers: Threads that decode ahead; one batch is read ahead even without.
        progress: Called after each batch of this rank with the number of images in it.
        keep: Called with each batch of this rank, in order.

    Returns:
        One for each network, in their order.

    Raises:
        InputError: If there are fewer than two images, one cannot be read, or features are not finite.
    """
    if networks and images.count < 2:
        raise InputError(f"{images.source}: holds {images.count} image, expected at least 2 for figures about a set")
    gathered = [_Gathered(images, network) for network in networks]
    device = networks[0].device if networks else torch.device("cpu")
    digests = torch.zeros(images.count, DIGEST_BYTES, dtype=torch.uint8)
    batches: Any = images.batches(batch_size, workers=workers, rank=rank(), ranks=world_size())
    with contextlib.closing(batches), contextlib.closing(_ahead(images, batches, device)) as ready:
        first = rank() * images.count // world_size()
        for batch, pixels in ready:
            number = len(batch.places)
            on_device = pixels.to(device, non_blocking=True)
            for each in gathered:
                each.add(first, each.network.look_pixels(on_device))
            table = np.frombuffer(b"".join(batch.digests), dtype=np.uint8).reshape(number, DIGEST_BYTES)
            digests[first : first + number] = torch.from_numpy(table.copy())
            first += number
            if keep is not None:
                keep(batch)
            if progress is not None:
                progress(number)
    if not networks:
        return []
    digests = _shared(digests.to(device)).cpu()
    known = [bytes(row) for row in digests.numpy()]
    return [each.finished(known) for each in gathered]


def is_adm_statistics(source: Path | str) -> bool:
    """Return whether a file is an .npz archive with mean and covariance of features, as ADM shares references.

    Args:
        source: What the user gave; anything else than such a file is not one.

    Returns:
        Whether `adm_statistics` is to read it.
    """
    path = Path(source)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not {"mu.npy", "sigma.npy"}.isdisjoint(archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def adm_statistics(path: Path | str, network: Extractor) -> SetFeatures:
    """Read the statistics of a reference set that ADM (arXiv:2105.05233) shares as an .npz file.

    These are `mu` and `sigma` of the features, `mu_s` and `sigma_s` of the spatial features if they are there. Images
    in `arr_0` are counted, not read: `open_images` reads them, and `with_images` joins what they give.

    Args:
        path: Of the file; nothing in it is unpickled.
        network: That the statistics are taken to be of, which the file does not say: only dimensions can be checked.

    Returns:
        The statistics on the network's device, without features.

    Raises:
        InputError: If the file is no whole archive, or statistics are missing, of other dimensions, not finite, or no
            covariance.
    """
    path = Path(path)
    shapes = {"mu": (network.dim,), "sigma": (network.dim,) * 2}
    shapes |= {"mu_s": (network.spatial_dim,), "sigma_s": (network.spatial_dim,) * 2}
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected an .npz file' if path.is_dir() else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            wanted = STATISTICS if members & set(STATISTICS[2:]) else STATISTICS[:2]
            missing = [name for name in wanted if name not in members]
            if missing:
                raise InputError(f"{path}: holds no {' and no '.join(missing)}, expected {', '.join(wanted)} as of ADM")
            found = {name: _statistic(path, archive, name, shapes[name], network) for name in wanted}
    except (InputError, MemoryError):
        raise
    except Exception as error:  # an archive of hostile bytes fails in every way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: is no whole .npz file ({reason}); fetch it again") from error
    images = open_npz(path) if ARRAY in members else None
    digest = hashlib.sha256()
    for name in wanted:
        digest.update(name.encode() + found[name].tobytes())
    tensors = {name: torch.from_numpy(array).to(network.device) for name, array in found.items()}
    return SetFeatures(
        source=str(path),
        count=0 if images is None else images.count,
        size=None if images is None else (images.height, images.width),
        pixels=None,
        extractor=network.name,
        extractor_sha256=network.sha256,
        mean=tensors["mu"],
        covariance=tensors["sigma"],
        spatial_mean=tensors.get("mu_s"),
        spatial_covariance=tensors.get("sigma_s"),
        features=None,
        logits=None,
        statistics_count=None,
        statistics=digest.hexdigest(),
    )


def with_images(statistics: SetFeatures, images: SetFeatures) -> SetFeatures:
    """Return stored statistics with the features of the images that lie beside them, for precision and the like.

    Args:
        statistics: As `adm_statistics` gives them.
        images: Of the same network.

    Returns:
        Moments of the one, all else of the other.

    Raises:
        InputError: If the networks differ.
    """
    if statistics.extractor_sha256 != images.extractor_sha256:
        raise InputError(
            f"{statistics.source}: its statistics are of {statistics.extractor}, its images are seen by "
            f"{images.extractor}; use one network for both"
        )
    return dataclasses.replace(
        statistics,
        count=images.count,
        size=images.size,
        pixels=images.pixels,
        features=images.features,
        logits=images.logits,
        distinct=images.distinct,
        order=images.order,
        crop=images.crop,
    )


class _Gathered:
    """What one network has seen so far, on its device."""

    def __init__(self, images: ImageSet, network: Extractor) -> None:
        self.images, self.network = images, network
        self.features = torch.zeros(images.count, network.dim, device=network.device)
        self.logits: Tensor | None = None
        if network.num_classes is not None:
            self.logits = torch.zeros(images.count, network.num_classes, device=network.device)
        self.spatial = Moments(network.spatial_dim, network.device)
        self.waiting: list[Tensor] = []

    def add(self, first: int, looked: Looked) -> None:
        rows = slice(first, first + len(looked.features))
        self.features[rows] = looked.features
        if self.logits is not None and looked.logits is not None:
            self.logits[rows] = looked.logits
        self.waiting.append(looked.spatial)
        if sum(map(len, self.waiting)) >= SPATIAL_ROWS:
            self._count_in()

    def finished(self, digests: list[bytes]) -> SetFeatures:
        self._count_in()
        features = _shared(self.features)
        logits = None if self.logits is None else _shared(self.logits)
        spatial = self.spatial.over_ranks()
        moments = Moments(self.network.dim, self.network.device)
        moments.add(features)  # of all, so that neither batches nor ranks change a digit
        try:
            values = (moments.mean, moments.covariance, spatial.mean, spatial.covariance)
        except InputError as error:
            raise InputError(f"{self.images.source}: {self.network.name} finds no figures for it: {error}") from error
        order = sorted(range(len(digests)), key=digests.__getitem__)
        return SetFeatures(
            source=self.images.source,
            count=self.images.count,
            size=self.images.size,
            pixels=pixel_fingerprint(digests),
            extractor=self.network.name,
            extractor_sha256=self.network.sha256,
            mean=values[0],
            covariance=values[1],
            spatial_mean=values[2],
            spatial_covariance=values[3],
            features=features,
            logits=logits,
            statistics_count=self.images.count,
            distinct=len(set(digests)),
            order=torch.tensor(order, device=features.device),
            crop=self.images.crop,
        )

    def _count_in(self) -> None:
        if self.waiting:
            self.spatial.add(torch.cat(self.waiting))
            self.waiting.clear()


def _shared(whole: Tensor) -> Tensor:
    """Let every rank have the rows that any of them has found; shares are cut as `ImageSet.batches` does."""
    ranks = world_size()
    if ranks > 1:
        for owner in range(ranks):
            part = whole[owner * len(whole) // ranks : (owner + 1) * len(whole) // ranks]
            if len(part):
                dist.broadcast(part, src=owner)
    return whole


def _ahead(
    images: ImageSet, batches: Iterator[ImageBatch], device: torch.device
) -> Generator[tuple[ImageBatch, Tensor], None, None]:
    """Yield batches, and their pixels ready to be copied to the device; files are read in a thread of their own."""

    def following() -> tuple[ImageBatch, Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, _pinned(batch.pixels, device))

    if images.kind not in ("folder", "npz"):  # networks make the others, in the caller's thread with its modes
        yield from iter(following, None)
        return
    waiting: collections.deque[Future[tuple[ImageBatch, Tensor] | None]] = collections.deque()
    with ThreadPoolExecutor(1, "softvq-features") as thread:
        try:
            waiting.extend(thread.submit(following) for _ in range(READ_AHEAD))
            while (found := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(following))
                yield found
        finally:
            for future in waiting:
                future.cancel()


def _pinned(pixels: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return pixels
    with torch.cuda.device(device):  # a thread of its own would otherwise start the first GPU
        return pixels.pin_memory()


def _statistic(path: Path, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], network: Extractor) -> Any:
    """Read one array of a known shape, in float64."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(MAX_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, is_fortran, dtype = header(head)
        if found != shape or dtype.kind != "f":
            raise InputError(
                f"{path}: {name} is {dtype} {list(found)}, expected floats {list(shape)} as {network.name} gives them"
            )
        length = math.prod(shape) * dtype.itemsize
        if info.file_size != head.tell() + length:  # so that no more is unfolded than there is room for
            raise InputError(f"{path}: {name} holds {info.file_size} bytes, not what its shape says; fetch it again")
        data = head.read()
        data += member.read(length - len(data))
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C").astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds numbers that are not finite; fetch it again")
    if array.ndim == 2:
        largest = np.abs(array).max()
        if np.abs(array - array.T).max() > ROUNDING * largest or array.diagonal().min() < 0:
            raise InputError(
                f"{path}: {name} is no covariance, which is symmetric with variances from 0; fetch it again"
            )
        array = (array + array.T) / 2
    return np.ascontiguousarray(array)
