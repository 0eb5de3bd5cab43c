"""Compiling networks in place, in regions, so that a network of 24 equal blocks costs the compile time of one."""

from typing import Any

import torch
from torch import nn

from softvq.backbones import FrozenBackbone
from softvq.losses.discriminators import TokenHead
from softvq.training import blocks
from softvq.training.adversary import Adversary

__all__ = ["compile_regions"]

REGIONS = (*blocks.KINDS, TokenHead)
VARIANTS = 64
"""Ways in which one region may be called: widths, batches, with and without gradients, weights that are constants."""


def compile_regions(module: nn.Module, **options: Any) -> None:
    """Compile a network: each of its transformer blocks and heads by itself, or all of it if it has none.

    Equal regions share their compiled code. Shapes are taken as they are; a new one compiles anew.

    Args:
        module: Changed in place.
        **options: As `torch.nn.Module.compile` takes them.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    options = {"dynamic": False, **options}
    if isinstance(module, Adversary):
        module.compile_augmentation(**options)
        module = module.discriminator
    regions = [part for part in _modules(module) if isinstance(part, REGIONS)]
    for region in regions or [module]:
        region.compile(**options)


def _modules(module: nn.Module) -> list[nn.Module]:
    """Return a module with all in it, and in the networks that frozen backbones hide."""
    found = list(module.modules())
    return found + [part for one in found if isinstance(one, FrozenBackbone) for part in one.network.modules()]
