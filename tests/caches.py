"""What the tests of latent caches share: photographs, a tokenizer that is easily understood, and ways to use them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.latent_cache import CacheHeader, CachePlan
from softvq.data.latent_writer import write_cache

TOKENS, DIM, SIDE = 4, 3, 16
NAMES = tuple(f"{'ab-ant' if i % 3 else 'ab'}/{i:02}.png" for i in range(22))
PLAN = CachePlan(tokenizer="model", fingerprint="f" * 64, tokens=TOKENS, dim=DIM, shard_size=6, softvq_version="0")
FULL = dataclasses.replace(PLAN, dtype="float32")


def encode(images: Tensor) -> Tensor:
    """Mean colours of the four stripes, from left to right: what mirroring changes."""
    return images.unflatten(-1, (TOKENS, -1)).mean((2, 4)).mT


def open_folder(root: Path, side: int = SIDE) -> PhotoFolder:
    return PhotoFolder(root, side, DataConfig(crop="center", flip=False), seed=0)


def make(out: Path, folder: PhotoFolder, plan: CachePlan = PLAN, **options: Any) -> tuple[CacheHeader, int]:
    return write_cache(out, folder, plan, options.pop("encode", encode), **{"batch_size": 4, **options})


def failing_after(count: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[Tensor], Tensor]:
    calls = iter(range(count))

    def call(images: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise error
        return encode(images)

    return call


def one_sentence(error: pytest.ExceptionInfo[Exception], *names: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert not [name for name in map(str, names) if name not in text], text
