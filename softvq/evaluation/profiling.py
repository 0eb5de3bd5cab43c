"""Where a GPU's time goes, by the kind of its kernels."""

import dataclasses
import re
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Share", "profiled", "shares_of"]

CALLS = 2
KINDS = (
    ("attention", r"sdpa|flash|fmha|attention|compute_dot_do_o|convert_dq"),
    ("layout", r"nchwToNhwc|nhwcToNchw|NhwcToNchw|AddPadding|direct_copy|bfloat16_copy|CatArray"),
    ("fused by the compiler", r"^triton_"),
    ("convolutions", r"xmma_(fprop|dgrad|wgrad)|conv|fprop|dgrad|wgrad"),
    ("matrix products", r"nvjet|gemm|gemv|cutlass|splitK|cublas"),
    ("optimizer, averages, norms of gradients", r"multi_tensor_apply|lpnorm"),
    ("copies and fills", r"^Mem(cpy|set)|memcpy|FillFunctor"),
    ("sums and norms", r"reduce_kernel|layer_norm|GammaBeta|softmax"),
    ("elementwise", r"elementwise"),
)
"""Names of kernels, as cuDNN, cuBLAS, PyTorch and its compiler give them; the first that fits counts."""
OTHER = "other"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The kernels of one kind."""

    kind: str
    """Which."""
    seconds: float
    """Of one call."""
    launches: float
    """Of one call."""
    longest: str
    """Name of the kernel that takes most of it."""


def shares_of(kernels: Iterable[tuple[str, float, int]], calls: int) -> list[Share]:
    """Sum up kernels by kind.

    Args:
        kernels: Name, seconds and launches of each.
        calls: In how many calls.

    Returns:
        The kinds that there are, the longest first.
    """
    found: dict[str, list[tuple[str, float, int]]] = {}
    for kernel in kernels:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, kernel[0])), OTHER)
        found.setdefault(kind, []).append(kernel)
    shares = [
        Share(
            kind=kind,
            seconds=sum(seconds for _, seconds, _ in group) / calls,
            launches=sum(launches for *_, launches in group) / calls,
            longest=max(group, key=lambda kernel: kernel[1])[0],
        )
        for kind, group in found.items()
    ]
    return sorted(shares, key=lambda share: -share.seconds)


def profiled(call: Callable[[], object]) -> list[Share]:
    """Return where the time of a call goes that was made before, on a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    kernels = [
        (event.name, 1e-6 * event.self_device_time_total, 1)
        for event in watched.events() or ()
        # a range that someone named lies over kernels that are counted already
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return shares_of(kernels, CALLS)
