"""The GPU's side of `softvq.inference.rows`: each row is read once and stays in registers until it is done."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["activate", "add_norm", "attend"]

FP8_MAX = tl.constexpr(448.0)
FP8_TINY = tl.constexpr(1e-12)


def add_norm(
    stream: Tensor,
    out: Tensor,
    update: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    *,
    tokens: int,
    plus: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Launch the kernel; see `rows.add_norm`, whose arguments these are, checked."""
    count, width = stream.shape
    branch, gate = update if update is not None else (stream, stream)
    scale, shift = modulation if modulation is not None else (stream, stream)
    quantized = dtype == torch.float8_e4m3fn
    values = torch.empty_like(stream, dtype=dtype) if modulation is not None else stream
    scales = torch.empty(count, 1, device=stream.device) if quantized else stream
    main, rest = _halves(width)
    _add_norm[(count,)](
        stream, branch, gate, scale, shift, out, values, scales,
        tokens, width, gate.stride(0), scale.stride(0), shift.stride(0), plus, eps,
        ADD=update is not None, NORM=modulation is not None, QUANTIZED=quantized, MAIN=main, REST=rest,
        num_warps=max(1, min(8, main // 256)),
    )  # fmt: skip
    return None if modulation is None else (values, scales)


def activate(hidden: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see `rows.activate`."""
    count, width = hidden.shape
    quantized = dtype == torch.float8_e4m3fn
    values = torch.empty_like(hidden, dtype=dtype)
    scales = torch.empty(count, 1, device=hidden.device) if quantized else hidden
    main, rest = _halves(width)
    _activate[(count,)](
        hidden, values, scales, width, KIND=kind, QUANTIZED=quantized, MAIN=main, REST=rest,
        num_warps=max(1, min(8, main // 512)),
    )  # fmt: skip
    return values, scales


def attend(packed: Tensor, tokens: int, heads: int) -> Tensor:
    """Launch the kernel; see `rows.attend`, which checks."""
    count, width = packed.shape[0], packed.shape[1] // 3
    head = width // heads
    out = packed.new_empty(count, width)
    _attend[(count // tokens, heads)](
        packed, out, tokens, width, head, head**-0.5 * 1.4426950408889634,  # log2(e), because powers of 2 are faster
        TOKENS=max(16, triton.next_power_of_2(tokens)), HEAD=max(16, triton.next_power_of_2(head)),
        num_warps=4,
    )  # fmt: skip
    return out


def _halves(width: int) -> tuple[int, int]:
    """Return two powers of two, or one and 0, that a row is read in: most widths are their sum, so no lane idles."""
    main = 1 << (width.bit_length() - 1)
    return main, triton.next_power_of_2(width - main) if width > main else 0


@triton.jit
def _loaded(row, place, inside):
    return tl.load(row + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _stored(row, place, inside, values):
    tl.store(row + place, values.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(
    stream, branch, gate, scale, shift, out, values, scales,
    tokens, width, gate_step, scale_step, shift_step, plus, eps,
    ADD: tl.constexpr, NORM: tl.constexpr, QUANTIZED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    stream += row * width
    branch += row * width
    out += row * width
    values += row * width
    gate += image * gate_step
    scale += image * scale_step
    shift += image * shift_step
    a = tl.arange(0, MAIN)
    in_a = a < width
    x = _loaded(stream, a, in_a)
    if ADD:
        x += _loaded(branch, a, in_a) * _loaded(gate, a, in_a)
        _stored(out, a, in_a, x)
    if REST:
        b = MAIN + tl.arange(0, REST)
        in_b = b < width
        z = _loaded(stream, b, in_b)
        if ADD:
            z += _loaded(branch, b, in_b) * _loaded(gate, b, in_b)
            _stored(out, b, in_b, z)
    if NORM:
        total = tl.sum(x)
        if REST:
            total += tl.sum(z)
        mean = total / width
        x -= mean
        power = tl.sum(x * x)
        if REST:
            z = tl.where(in_b, z - mean, 0.0)
            power += tl.sum(z * z)
        factor = tl.rsqrt(power / width + eps)
        x = x * factor * (plus + _loaded(scale, a, in_a)) + _loaded(shift, a, in_a)
        if REST:
            z = z * factor * (plus + _loaded(scale, b, in_b)) + _loaded(shift, b, in_b)
        if QUANTIZED:
            most = tl.maximum(tl.max(tl.abs(x)), FP8_TINY)
            if REST:
                most = tl.maximum(most, tl.max(tl.where(in_b, tl.abs(z), 0.0)))
                z *= FP8_MAX / most
            x *= FP8_MAX / most
            tl.store(scales + row, most / FP8_MAX)
        _stored(values, a, in_a, x)
        if REST:
            _stored(values, b, in_b, z)


@triton.jit
def _activated(y, KIND: tl.constexpr):
    if KIND == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # 2 sqrt(2 / pi)
    if KIND == "gelu":
        # Abramowitz and Stegun, 7.1.26: erf to 1.5e-7 with one exponential, where the library's has branches
        z = tl.abs(y) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * series * tl.exp(-z * z)
        y = y * tl.where(y > 0, 1.0 - tail, tail)
    return y


@triton.jit
def _activate(
    hidden, values, scales, width,
    KIND: tl.constexpr, QUANTIZED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    hidden += row * width
    values += row * width
    a = tl.arange(0, MAIN)
    in_a = a < width
    x = _activated(_loaded(hidden, a, in_a), KIND)
    if REST:
        b = MAIN + tl.arange(0, REST)
        in_b = b < width
        z = _activated(_loaded(hidden, b, in_b), KIND)
    if QUANTIZED:
        most = tl.maximum(tl.max(tl.abs(x)), FP8_TINY)
        if REST:
            most = tl.maximum(most, tl.max(tl.abs(z)))
            z *= FP8_MAX / most
        x *= FP8_MAX / most
        tl.store(scales + row, most / FP8_MAX)
    _stored(values, a, in_a, x)
    if REST:
        _stored(values, b, in_b, z)


@triton.jit
def _attend(packed, out, tokens, width, head, scale, TOKENS: tl.constexpr, HEAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tokens
    first = tl.program_id(1) * head
    token = tl.arange(0, TOKENS)
    place = tl.arange(0, HEAD)
    inside = (token < tokens)[:, None] & (place < head)[None, :]
    start = packed + (row + token)[:, None] * (3 * width) + first + place[None, :]
    queries = tl.load(start, mask=inside, other=0.0)
    keys = tl.load(start + width, mask=inside, other=0.0)
    logits = tl.dot(queries, tl.trans(keys)) * scale
    logits = tl.where((token < tokens)[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(weights, axis=1)
    values = tl.load(start + 2 * width, mask=inside, other=0.0)
    found = tl.dot(weights.to(values.dtype), values) / total[:, None]
    tl.store(out + (row + token)[:, None] * width + first + place[None, :], found.to(out.dtype.element_ty), mask=inside)
