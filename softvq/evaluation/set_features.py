"""What networks see in a whole set of images: features, logits and moments, in one pass over any number of processes.

The pass is as fast as the networks: the next batch is read while this one is looked at, all that is found stays on the
device in its place, and the host waits for nothing before the end.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError, RunError
from softvq.evaluation.extractors import Extractor, Looked
from softvq.evaluation.image_sets import ImageBatch, ImageSet, pixel_fingerprint
from softvq.evaluation.moments import Moments
from softvq.ranks import rank, world_size

__all__ = ["SetFeatures", "set_features", "thinned"]

READ_AHEAD = 2
DIGEST_BYTES = 16
SPATIAL_ROWS = 1024
"""How many images' spatial features wait until they are counted in."""


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


def thinned(found: SetFeatures, places: Sequence[int]) -> SetFeatures | None:
    """Return what was seen in some images of a set, for a comparison with as many others.

    Args:
        found: Of the whole set.
        places: Of the images, at least two.

    Returns:
        The part, without what is not kept by image: the spatial moments and the fingerprint. None where there are only
        statistics.
    """
    if found.features is None:
        return None
    chosen = torch.tensor(places, device=found.features.device)
    features = found.features[chosen]
    moments = Moments(features.shape[1], features.device)
    moments.add(features)
    return dataclasses.replace(
        found,
        count=len(places),
        pixels=None,
        mean=moments.mean,
        covariance=moments.covariance,
        spatial_mean=None,
        spatial_covariance=None,
        features=features,
        logits=None if found.logits is None else found.logits[chosen],
        statistics_count=len(places),
        distinct=None,
        order=None,
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
                try:
                    dist.broadcast(part, src=owner)
                except RuntimeError as error:
                    raise RunError("another process has ended early; what it says is the reason") from error
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
