"""Photographs to a latent cache that generators are trained on: `softvq cache-latents`."""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from softvq import __version__
from softvq.commands.common import (
    check_output,
    check_tokens,
    choose_size,
    load_tokenizer,
    messages,
    precision_of,
    progress,
    results,
)
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.latent_cache import CacheHeader, CachePlan
from softvq.data.latent_writer import write_cache
from softvq.training.distributed import choose_device

__all__ = ["cache_latents"]


@torch.inference_mode()
def cache_latents(arguments: argparse.Namespace) -> None:
    """Write the latents of all photographs of a folder to a latent cache, or go on with one."""
    out = Path(arguments.out)
    check_output(out, overwrite=True)  # what is in it is looked at by `write_cache`
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    check_tokens(arguments.tokens, tokenizer)
    size = choose_size(None if arguments.size is None else str(arguments.size), tokenizer)
    assert size is not None
    data = DataConfig(crop="center", flip=False, cache_megabytes=0)
    folder = PhotoFolder(arguments.data, size[0], data, seed=0)
    plan = CachePlan(
        tokenizer=arguments.model,
        fingerprint=tokenizer.latent_fingerprint(),
        tokens=arguments.tokens or tokenizer.config.num_latent_tokens,
        dim=tokenizer.config.latent_dim,
        flip=arguments.flip,
        dtype=arguments.dtype,
        precision=arguments.precision,
        shard_size=arguments.shard_size,
        softvq_version=__version__,
    )

    def encode(images: Tensor) -> Tensor:
        with precision_of(device, arguments.precision):
            return tokenizer.encode(images.to(device))[:, : arguments.tokens]

    console = messages()
    for sentence in folder.source.remarks:
        console.print(sentence, soft_wrap=True)

    def watch(parts: Sequence[Any]) -> Iterable[Any]:
        return progress(parts, "photographs", console)

    start = time.perf_counter()
    header, count = write_cache(
        out,
        folder,
        plan,
        encode,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        watch=watch,
        tell=lambda sentence: console.print(f"skipped: {sentence}", soft_wrap=True),
    )
    _print_table(out, header, count, time.perf_counter() - start)


def _print_table(out: Path, header: CacheHeader, count: int, seconds: float) -> None:
    size = sum((out / shard.file).stat().st_size for shard in header.shards)
    table = Table("images", "skipped", "views", "tokens x dim", "shards", "bytes", "images/s")
    shape = f"{header.plan.tokens} x {header.plan.dim}, {header.plan.dtype}"
    speed = f"{count / seconds:.1f}" if count else "-"
    table.add_row(
        f"{header.images:,}",
        f"{len(header.skipped):,}",
        str(header.views),
        shape,
        f"{len(header.shards):,}",
        f"{size:,}",
        speed,
    )
    console = results()
    console.print(table)
    done = (
        f"complete, {count:,} photograph{'s' * (count != 1)} encoded" if count else "was complete, every shard is whole"
    )
    console.print(f"{out}: {done}", soft_wrap=True)
