"""Fully sharded training: each rank keeps its part of the matrices, of their gradients, optimizer state and averages.

FSDP2 gathers the matrices of a transformer block when it is computed, and adds gradients up where their part is kept.
Vectors - biases, norms, scales - stay whole on every rank: they are small, and in float32 as elsewhere, so that the
matrices in bf16, which autocast would make of them anyway, are all that changes. A part is an ordinary tensor, which
shares its memory with the `DTensor` that stands in the module; what is elementwise is done on parts.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from softvq.ranks import is_main, world_size
from softvq.training.blocks import trained_blocks
from softvq.training.task import Task

__all__ = [
    "as_spread",
    "clip_gradients",
    "copy_into",
    "gathered",
    "is_spread",
    "local",
    "local_parameter",
    "put_away",
    "shard_task",
    "whole",
]


HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Of a module, where FSDP registers what it does."""


def shard_task(task: Task, device: torch.device, dtype: torch.dtype) -> None:
    """Spread the matrices that a task trains over all ranks, in place; its critic and what is frozen stay whole.

    Args:
        task: On its device, with the same weights on every rank.
        device: Where it is.
        dtype: What the matrices of transformer blocks are gathered in; gradients are summed in float32.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    staying = {parameter for parameter in task.parameters() if not parameter.requires_grad or parameter.ndim < 2}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in trained_blocks(task.model):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=staying)
    root = fully_shard(
        task, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=staying
    )
    # a gradient may be asked for within the forward pass, which would take away weights that the rest of it needs
    root.set_reshard_after_backward(False, recurse=False)
    register_fsdp_forward_method(task, "health")


def put_away(task: Task) -> None:
    """Free what was gathered; before weights are changed, and after everything that computes with them."""
    if isinstance(task, FSDPModule):
        task.reshard()


def is_spread(tensor: Tensor) -> bool:
    """Return whether each rank has a part of a tensor only."""
    return isinstance(tensor, DTensor)


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Return this rank's part of a parameter for an optimizer, in the same memory, with a gradient of its own."""
    return nn.Parameter(local(parameter)) if is_spread(parameter) else parameter


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; a tensor that is not spread is its own part."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def as_spread(part: Tensor, like: Tensor) -> Tensor:
    """Return a part as what it is a part of, in the same memory.

    Args:
        part: Of this rank.
        like: Spread as the result is to be; of one that is not spread the part is everything.

    Returns:
        A tensor of the shape of `like`.
    """
    if not isinstance(like, DTensor) or part.ndim != like.ndim:
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, or of a spread target this rank's part of it."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        mesh, placements = target.device_mesh, target.placements
        source = distribute_tensor(source.to(target.device), mesh, placements, src_data_rank=None)
    local(target).copy_(local(source))


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors whole, on the first rank; every rank must call it if any of them is spread.

    Args:
        tensors: The same names in the same order on every rank.

    Returns:
        Those that were spread on the CPU, the others as they are; on the other ranks only the others.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
            continue
        complete = _complete(tensor)
        if complete is not None:
            found[name] = complete.cpu()
    return found


@contextlib.contextmanager
def whole(task: Task) -> Iterator[None]:
    """Give the first rank the whole float32 weights in a module without FSDP; every rank must enter and leave it.

    Args:
        task: Between two updates. If it is not sharded, nothing is done.
    """
    spread = {name: weight for name, weight in task.named_parameters() if isinstance(weight, DTensor)}
    complete = {name: _complete(weight) for name, weight in spread.items()}
    hooked = [module for module in task.modules() if isinstance(module, FSDPModule)] if is_main() else []
    hooks = [{kind: getattr(module, kind) for kind in HOOKS} for module in hooked]
    for module in hooked:  # FSDP would wait for ranks that compute nothing now
        for kind in HOOKS:
            setattr(module, kind, OrderedDict())
    _set_weights(task, {name: weight for name, weight in complete.items() if weight is not None})
    try:
        yield
    finally:
        _set_weights(task, spread)
        for module, own in zip(hooked, hooks, strict=True):
            for kind, value in own.items():
                setattr(module, kind, value)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], parts: Iterable[Tensor], limit: float) -> Float[Tensor, ""]:
    """Average the gradients that FSDP leaves alone, hand each part its own, and scale all to a norm of at most `limit`.

    Args:
        parameters: Some of them spread; all with the gradient of an update, or none.
        parts: Of these, in the same order; what is not spread is its own part.
        limit: On the norm of all gradients of all ranks together.

    Returns:
        The norm before.
    """
    parameters, parts = list(parameters), list(parts)
    kept = [p for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    _average([p.grad for p in kept if p.grad is not None])
    spread = []
    for parameter, part in zip(parameters, parts, strict=True):
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            part.grad = local(parameter.grad)
            if part.numel() > 0:  # of a matrix of fewer rows than ranks some have nothing
                spread.append(part)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in (spread, kept)]
    squares = norms[0].to(parts[0].device).square()
    dist.all_reduce(squares)
    norm = (squares + norms[1].to(squares.device).square()).sqrt()
    if math.isfinite(limit):
        nn.utils.clip_grads_with_norm_(spread + kept, limit, norm)
    return norm


def _average(gradients: list[Tensor]) -> None:
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _complete(spread: DTensor) -> Tensor | None:
    """Return a tensor whole on the first rank; every rank must call it."""
    tensor = spread.full_tensor().detach()
    return tensor if is_main() else None


def _set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
