"""How near reconstructions are to their photographs: every pair is measured as it passes, and none is kept."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from softvq.data.images import to_image
from softvq.errors import InputError, RunError
from softvq.evaluation.image_sets import ImageSet, picked, pixel_fingerprint
from softvq.evaluation.latent_report import has_codewords
from softvq.evaluation.pair_figures import Distance, pair_figures
from softvq.ranks import world_size
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["Meter", "Pair", "Rebuilt", "Reconstructions", "check_pairs", "names_of", "rebuilt"]

DIGEST_BYTES = 16
AVERAGES = ("likeliest", "marginal", "posterior_entropy", "max_probability")


class Rebuilt(NamedTuple):
    """What a tokenizer makes of photographs."""

    pixels: UInt8[Tensor, "batch 3 height width"]
    """As they would be saved, on the tokenizer's device."""
    averages: dict[str, Tensor]
    """What `quantizer.averages` says of their tokens; nothing where there is no codebook."""


@torch.no_grad()
def rebuilt(
    tokenizer: ImageTokenizer,
    pixels: UInt8[Tensor, "batch 3 height width"],
    *,
    precision: str = "float32",
    num_tokens: int | None = None,
) -> Rebuilt:
    """Encode and decode photographs, and round what comes back to 8 bits.

    Args:
        tokenizer: In evaluation mode.
        pixels: RGB, of a size the patch divides; on any device.
        precision: `float32`, or `bf16` for autocast.
        num_tokens: Decode the first so many alone; all by default.

    Returns:
        The reconstructions, and what the codebook had to do with them.

    Raises:
        RunError: If the model gives values that are not finite.
    """
    device = tokenizer.latent_mean.device
    images = pixels.to(device).float() / 127.5 - 1
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        seen = tokenizer.encode_pre(images)
        latents = (tokenizer.quantizer.encode(seen) - tokenizer.latent_mean) / tokenizer.latent_std
        decoded = tokenizer.decode(latents[:, :num_tokens], (images.shape[2], images.shape[3])).float()
        averages = tokenizer.quantizer.averages(seen) if has_codewords(tokenizer) else {}
    if not bool(decoded.isfinite().all()):
        raise RunError("the model paints values that are not finite; try --precision float32, or another model")
    return Rebuilt(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), averages)


class Meter:
    """The figures of all pairs, in order of place; each rank fills in its own, and `over_ranks` puts them together.

    Args:
        count: Pairs, >= 1.
        names: Of the figures, as `figure_names` has them.
        device: Where the figures are kept; adding those of that device waits for nothing.
    """

    def __init__(self, count: int, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self._table = torch.zeros(count, len(self.names), dtype=torch.float64, device=device)
        self._digests = {name: torch.zeros(count, DIGEST_BYTES, dtype=torch.uint8) for name in ("data", "made")}
        self._averages: dict[str, Tensor] = {}
        self._images = 0

    def add(self, places: Tensor, figures: dict[str, Tensor]) -> None:
        """Write down what `pair_figures` says of pairs; said twice it counts once."""
        self._table[places.to(self._table.device)] = torch.stack([figures[name] for name in self.names], 1)

    def add_digests(self, which: str, places: Tensor, digests: Sequence[bytes]) -> None:
        """Write down the digests of photographs (`data`) or reconstructions (`made`)."""
        self._digests[which][places] = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)

    def add_averages(self, averages: dict[str, Tensor], images: int) -> None:
        """Count in what a quantizer says of the tokens of some images."""
        for name, value in averages.items():
            self._averages[name] = self._averages.get(name, 0) + value.double() * images
        self._images += images

    def over_ranks(self) -> None:
        """Put together what the ranks found, the same everywhere; every rank must call it, once."""
        if world_size() == 1:
            return
        images = torch.tensor(self._images, dtype=torch.int64)
        for tensor in (self._table, *self._digests.values(), images):
            dist.all_reduce(tensor)
        self._images = int(images)
        # a rank without images knows no shapes, and must wait with the others all the same
        for name in AVERAGES:
            self._averages |= _summed(name, self._averages.get(name), self._table.device)

    @property
    def table(self) -> Float64[Tensor, "image figure"]:
        """All figures on the CPU, columns as `names`; a RunError where one is no number."""
        table = self._table.cpu()
        broken = table.isnan().nonzero()
        if len(broken):
            image, figure = broken[0].tolist()
            raise RunError(f"{self.names[figure]} of image {image} is no number; look at the weights behind it")
        return table

    @property
    def averages(self) -> dict[str, Tensor]:
        """Means of what the quantizer said, over all images; nothing where there is no codebook."""
        return {name: value / self._images for name, value in self._averages.items()}

    def fingerprint(self, which: str) -> str:
        """Return the `pixel_fingerprint` of the photographs (`data`) or of the reconstructions (`made`)."""
        return pixel_fingerprint(bytes(row) for row in self._digests[which].tolist())


def _summed(name: str, value: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    shape = torch.zeros(2, dtype=torch.int64)  # of codebooks and codewords; 0 where there is no such axis
    if value is not None:
        shape[: value.ndim] = torch.tensor(value.shape)
    dist.all_reduce(shape, dist.ReduceOp.MAX)
    size = [side for side in shape.tolist() if side]
    if not size:
        return {}
    whole = torch.zeros(size, dtype=torch.float64, device=device) if value is None else value.clone()
    dist.all_reduce(whole)
    return {name: whole}


class Pair(NamedTuple):
    """Some photographs and their reconstructions."""

    places: Int64[Tensor, " batch"]
    """Numbers of the photographs in their set, on the CPU."""
    digests: tuple[bytes, ...]
    """Of the photographs."""
    originals: UInt8[Tensor, "batch 3 height width"]
    """The photographs."""
    reconstructions: UInt8[Tensor, "batch 3 height width"]
    """What comes back, on the same device."""
    averages: dict[str, Tensor]
    """See `Rebuilt`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reconstructions:
    """Photographs beside what comes back of them, which is made, or read, when it is asked for."""

    data: ImageSet
    """The photographs."""
    made: ImageSet | None
    """Finished reconstructions, in the same order; None makes them."""
    rebuild: Callable[[Tensor], Rebuilt] | None
    """Makes reconstructions of 8-bit pixels, where `made` is None."""
    source: str
    """What the reconstructions are of: a model, or a set."""
    device: torch.device
    """Where pairs are compared."""
    batch_size: int
    """Pairs at once."""
    workers: int
    """Threads that decode ahead."""

    def pairs(self, places: Sequence[int]) -> Iterator[Pair]:
        """Return the pairs at some places.

        Args:
            places: Ascending numbers of photographs.

        Yields:
            Pairs in that order, at most `batch_size` at once.
        """
        if not len(places):
            return
        whole = torch.tensor(list(places), dtype=torch.int64)
        theirs: Iterator[Any] = itertools.repeat(None)
        if self.made is not None:
            theirs = picked(self.made, places).batches(self.batch_size, workers=self.workers)
        for batch in picked(self.data, places).batches(self.batch_size, workers=self.workers):
            other, pixels = next(theirs), batch.pixels.to(self.device)
            if other is None:
                assert self.rebuild is not None
                back = self.rebuild(pixels)
            else:
                back = Rebuilt(other.pixels.to(self.device), {})
            yield Pair(whole[batch.places], batch.digests, pixels, back.pixels, back.averages)

    def measured(self, meter: Meter, distance: Distance | None = None) -> ImageSet:
        """Return the reconstructions as a set, whose pairs are measured while it is read.

        The digests of reconstructions are the reader's to write down: only it is given them.

        Args:
            meter: Takes the figures, and the digests of the photographs.
            distance: A perceptual distance, if there is one.

        Returns:
            The set, whose names are those of the photographs.
        """

        def items(start: int, stop: int) -> Generator[np.ndarray, None, None]:
            for pair in self.pairs(range(start, stop)):
                meter.add(pair.places, pair_figures(pair.originals, pair.reconstructions, distance))
                meter.add_digests("data", pair.places, pair.digests)
                meter.add_averages(pair.averages, len(pair.places))
                yield from pair.reconstructions.permute(0, 2, 3, 1).contiguous().cpu().numpy()

        return dataclasses.replace(self.data, source=self.source, crop="none", kind="memory", items=items)

    def pictures(self, places: Sequence[int]) -> dict[int, tuple[Image.Image, Image.Image]]:
        """Return photographs and reconstructions to look at, read and made anew.

        Args:
            places: Numbers of photographs, in any order.

        Returns:
            A pair of pictures for each place.
        """
        found = {}
        for pair in self.pairs(sorted(set(places))):
            both = [pixels.cpu() / 127.5 - 1 for pixels in (pair.originals, pair.reconstructions)]
            for place, original, reconstruction in zip(pair.places.tolist(), *both, strict=True):
                found[place] = to_image(original), to_image(reconstruction)
        return found


def names_of(images: ImageSet) -> list[str]:
    """Return the name that each image of a set has in its batches."""
    return [f"{place:06d}" for place in range(images.count)] if images.names is None else list(images.names)


def check_pairs(data: ImageSet, made: ImageSet) -> str | None:
    """Refuse reconstructions that cannot be those of the photographs.

    Args:
        data: The photographs.
        made: Finished reconstructions, in the same order.

    Returns:
        A warning where nothing but their order says which belong together.

    Raises:
        InputError: If there are not as many, they are of another size, or both have names and these do not agree; what
            `softvq decode` calls its pictures agrees.
    """
    if data.count != made.count:
        raise InputError(
            f"{made.source}: holds {made.count} image{'s' * (made.count != 1)}, but {data.source} has {data.count}; "
            "give one for each"
        )
    if data.size != made.size:
        sizes = ["x".join(map(str, each.size)) for each in (made, data)]
        raise InputError(f"{made.source}: is {sizes[0]} (height x width), but {data.source} is {sizes[1]}; give --size")
    if data.names is None or made.names is None:
        return f"{made.source} or {data.source} has no names of images: pairs are made in the order in which they lie"
    for name, other in zip(data.names, made.names, strict=True):
        short = PurePosixPath(other).with_suffix("")
        if short not in (PurePosixPath(name), PurePosixPath(name).with_suffix("")):
            raise InputError(
                f"{made.source}: has {other!r} where {data.source} has {name!r}; give the reconstructions the names "
                "of the photographs"
            )
    return None
