"""The transformer blocks of a network, which hold most of its weights and most of its activations."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from softvq.generators.heads import HeadBlock
from softvq.generators.transformer import ModulatedBlock

__all__ = ["KINDS", "recompute_activations", "trained_blocks"]

KINDS = (Block, EvaBlock, HeadBlock, ModulatedBlock)


def trained_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks in which something is trained."""
    blocks = [part for part in module.modules() if isinstance(part, KINDS)]
    return [block for block in blocks if any(weight.requires_grad for weight in block.parameters())]


def recompute_activations(module: nn.Module) -> None:
    """Let each trained block keep its input alone, and compute the rest again in the backward pass.

    Args:
        module: Changed in place; names of weights stay what they are.
    """
    for block in trained_blocks(module):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    # blocks draw nothing, so that there is no state of a generator to keep
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
