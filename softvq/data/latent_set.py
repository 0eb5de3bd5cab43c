"""A latent cache in the memory of a device, as an endless, keyed stream of batches that never waits for the host."""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from softvq.data.latent_cache import LatentCache
from softvq.data.order import epoch_order
from softvq.errors import InputError
from softvq.randomness import keys_of, uniform

__all__ = ["LatentBatch", "LatentSet"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentBatch:
    """This rank's part of one step, on the device."""

    latents: Float32[Tensor, "batch token dim"]
    """Normalised latents."""
    labels: Int64[Tensor, " batch"]
    """Indices of classes, -1 where there are none."""
    positions: Int64[Tensor, " batch"]
    """Global sample numbers."""


class LatentSet:
    """The latents of a cache, addressed by global position; all of them lie on the device, once.

    At a position stands the image that `softvq.data.order.index_at` names, in the view a coin of that position chooses:
    the same on any rank, for any batch, and wherever a run was started.

    Args:
        cache: As `softvq.data.latent_cache.read_cache` gives it.
        device: Where the latents are kept, in the dtype they are stored in.
        seed: Of the run; decides order and views.
        flip: Take the mirrored view half of the time, where the cache has them; otherwise photographs as they are.

    Raises:
        InputError: If the latents do not fit into the device's memory.
    """

    def __init__(self, cache: LatentCache, device: torch.device | str, seed: int, flip: bool = True) -> None:
        self.device, self.seed = torch.device(device), seed
        latents = cache.latents if flip else cache.latents[:, :1]
        self._views = latents.shape[1]
        _check_room(latents.numel() * latents.element_size() + cache.labels.numel() * 8, self.device)
        self.classes = cache.classes
        self._latents = latents.to(self.device).flatten(0, 1)
        self._labels = cache.labels.to(self.device)

    def __len__(self) -> int:
        return len(self._labels)

    def batches(
        self, batch_size: int, start_step: int, num_steps: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[LatentBatch]:
        """Return this rank's part of steps `start_step` to `start_step + num_steps - 1`.

        Step s holds the positions s * batch_size to (s + 1) * batch_size - 1; rank r takes the r-th of `world_size`
        equal stretches.

        Args:
            batch_size: Of all ranks together; a multiple of `world_size`.
            start_step: First step, 0 or more.
            num_steps: Number of steps, 0 or more.
            rank: In [0, world_size).
            world_size: Number of ranks.

        Returns:
            Batches in the order of their steps.

        Raises:
            InputError: If `batch_size` cannot be shared out.
        """
        if batch_size < 1 or batch_size % world_size:
            raise InputError(f"batch_size is {batch_size}, expected a positive multiple of the {world_size} processes")
        assert 0 <= rank < world_size, f"rank is {rank} of {world_size}"
        share = batch_size // world_size
        starts = (step * batch_size + rank * share for step in range(start_step, start_step + num_steps))
        return self._stretches(starts, share)

    def _stretches(self, starts: Iterator[int], length: int) -> Iterator[LatentBatch]:
        size = len(self)
        orders: dict[int, Tensor] = {}
        for start in starts:
            end = start + length
            epochs = range(start // size, (end - 1) // size + 1)
            orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in epochs}
            places = [(max(start - epoch * size, 0), min(end - epoch * size, size)) for epoch in epochs]
            pieces = [orders[epoch][first:last] for epoch, (first, last) in zip(epochs, places, strict=True)]
            indices = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            yield self._batch(torch.arange(start, end, device=self.device), indices)

    def _order(self, epoch: int) -> Int64[Tensor, " size"]:
        order = epoch_order(epoch, len(self), self.seed)
        # from page-locked memory, else the copy would wait for all that the device has still to do
        return order.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else order

    def _batch(self, positions: Int64[Tensor, " batch"], indices: Int64[Tensor, " batch"]) -> LatentBatch:
        rows = indices
        if self._views > 1:
            mirrored = uniform(keys_of(self.seed, "flip", positions)) < 0.5
            rows = indices * self._views + mirrored
        return LatentBatch(
            latents=self._latents.index_select(0, rows).float(),
            labels=self._labels.index_select(0, indices),
            positions=positions,
        )


def _check_room(needed: int, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is not None and needed > free:
        raise InputError(
            f"the latents take {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB of {device} are free; "
            "give a smaller cache (--dtype float16, --no-flip), or a device with more memory"
        )


def _free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device; None on the CPU, where the latents are already."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for the next to ask
    return torch.cuda.mem_get_info(device)[0] + kept
