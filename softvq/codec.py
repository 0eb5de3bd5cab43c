"""A picture codec: a photograph to a file of a few hundred bytes, and back, with any tokenizer.

    from softvq.codec import compress, decompress

    data = compress(tokenizer, read_image("photo.jpg"))
    picture = decompress(tokenizer, data)

Latents are normalised, so the normal distribution says how likely each step is, and a range coder spends hardly more
bits than that. `softvq.data.svq` has the layout of files.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from softvq.data.images import center_crop, to_image, to_tensor
from softvq.data.svq import MAX_BITS, MAX_TOKENS, MAX_TOP, SvqHeader, pack, unpack
from softvq.errors import InputError, RunError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.quantizers import code_shape, innermost

__all__ = ["CodecConfig", "compress", "decompress", "fitted_size"]

REACH = 8.0
"""Latents are clamped to so many deviations."""
MEAN_STEPS, DEVIATION_STEPS = 16, 16  # of a fitted mean to a deviation, of a fitted deviation to a doubling
ROOTS = np.cumprod([1.0] + [math.sqrt(math.sqrt(math.sqrt(math.sqrt(2))))] * (DEVIATION_STEPS - 1))
"""The steps of a doubling, of roots and products, which are the same bits on every machine; exp2 need not be."""
BYTE = 127


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """What is written of a picture."""

    coder: Literal["latents", "codewords"] = "latents"
    """The latents in steps, or the likeliest codewords of each token with their weights."""
    tokens: int | None = None
    """The first so many, of a tokenizer with `min_latent_tokens`; None is all."""
    bits: int | None = None
    """Of latents, steps are 8 / 2^bits deviations; None is 4. Of codewords, what a weight takes; None is 4, and 0 where
    there is one, which then stands for the token as it is."""
    top: int = 1
    """Codewords of each token, 1 to 256."""
    fit: Literal["stretch", "shape", "crop"] = "stretch"
    """How a picture that is no square is brought to a size the tokenizer takes, see `fitted_size`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds = (
            ("tokens", self.tokens, 1, MAX_TOKENS),
            ("bits", self.bits, 0, MAX_BITS),
            ("top", self.top, 1, MAX_TOP),
        )
        for name, value, least, most in bounds:
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} is {value}, expected {least} to {most}")


@torch.inference_mode()
def compress(tokenizer: ImageTokenizer, image: Image.Image, config: CodecConfig | None = None) -> bytes:
    """Return a picture as the bytes of a `.svq` file.

    Args:
        tokenizer: In evaluation mode, on any device.
        image: RGB, as `softvq.data.images.read_image` gives it.
        config: What is written.

    Returns:
        A header of 28 bytes and the payload.

    Raises:
        InputError: If the tokenizer cannot be used so, or constriction is not installed.
        RunError: If the latents are not finite.
    """
    config = config or CodecConfig()
    tokens = config.tokens or tokenizer.config.num_latent_tokens
    codewords = config.coder == "codewords"
    bits = (0 if codewords and config.top == 1 else 4) if config.bits is None else config.bits
    width, height = (min(image.size),) * 2 if config.fit == "crop" else image.size
    header = SvqHeader(
        coder=config.coder,
        fit=config.fit,
        bits=bits,
        fingerprint=_fingerprint(tokenizer),
        width=width,
        height=height,
        tokens=tokens,
        top=config.top if codewords else 0,
    )
    _check(tokenizer, header)
    pixels = _fitted(tokenizer, image, header).to(tokenizer.latent_mean.device)
    if codewords:
        return pack(header, _encode_codewords(tokenizer, pixels, header))
    latents = tokenizer.encode(pixels)[0, :tokens].double().cpu().numpy()
    if not np.isfinite(latents).all():
        raise RunError("the latents of this picture are not finite; try another model")
    scale = 2**bits / REACH
    steps = np.rint(latents * scale).clip(-(2**bits), 2**bits).astype(np.int32)
    plain = _encode_steps(steps, None, bits)
    fitted = _encode_steps(steps, _statistics(latents), bits)
    if len(fitted) >= len(plain):
        return pack(header, plain)
    return pack(dataclasses.replace(header, coder="latents-fitted"), fitted)


@torch.inference_mode()
def decompress(tokenizer: ImageTokenizer, data: bytes) -> Image.Image:
    """Return the picture in the bytes of a `.svq` file, at its own size.

    Args:
        tokenizer: The one it was compressed with, or one with the same latents and another decoder.
        data: The file; damaged and hostile ones cost no more time or memory than good ones.

    Returns:
        RGB.

    Raises:
        InputError: If this is no such file, it is damaged, or belongs to another tokenizer.
        RunError: If the model paints values that are not finite.
    """
    header, payload = unpack(data)
    if header.fingerprint != _fingerprint(tokenizer):
        raise InputError(
            f"belongs to tokenizer {header.fingerprint.hex()}, not to {_fingerprint(tokenizer).hex()}; "
            "decompress it with the model that compressed it"
        )
    _check(tokenizer, header)
    device, size = tokenizer.latent_mean.device, fitted_size(tokenizer, header.width, header.height, header.fit)
    if header.coder == "codewords":
        images = tokenizer.decode_raw(_decode_codewords(tokenizer, payload, header)[None], size)
    else:
        steps = _decode_steps(payload, header, tokenizer.config.latent_dim)
        latents = torch.from_numpy(steps).to(device, torch.float32) * (REACH / 2**header.bits)
        images = tokenizer.decode(latents[None], size)
    if not bool(images.isfinite().all()):
        raise RunError("the model paints values that are not finite; try another model")
    picture = to_image(images[0])
    shape = header.width, header.height
    return picture if picture.size == shape else picture.resize(shape, Image.Resampling.BICUBIC)


def fitted_size(tokenizer: ImageTokenizer, width: int, height: int, fit: str) -> tuple[int, int]:
    """Return the height and width in pixels at which a picture is encoded, multiples of the patch.

    `stretch` and `crop` encode the square that the tokenizer was trained on, of the whole picture or of its middle;
    `shape` encodes about as many patches in nearly the picture's own proportions.

    Args:
        tokenizer: Knows its image size and patch.
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        fit: `stretch`, `shape` or `crop`.

    Returns:
        Height and width.
    """
    side, patch = tokenizer.config.image_size, tokenizer.config.patch_size
    if fit != "shape":
        return side, side
    patches = (side // patch) ** 2
    rows = min(max(round(math.sqrt(patches * height / width)), 1), patches)
    return rows * patch, max(round(patches / rows), 1) * patch


def _fitted(tokenizer: ImageTokenizer, image: Image.Image, header: SvqHeader) -> Float[Tensor, "1 3 height width"]:
    height, width = fitted_size(tokenizer, header.width, header.height, header.fit)
    if header.fit == "crop":
        return to_tensor(center_crop(image, height))[None]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(image)[None]


def _fingerprint(tokenizer: ImageTokenizer) -> bytes:
    return bytes.fromhex(tokenizer.latent_fingerprint())[:8]


def _check(tokenizer: ImageTokenizer, header: SvqHeader) -> None:
    """Refuse, before anything is computed, what the tokenizer cannot decode."""
    config = tokenizer.config
    most, least = config.num_latent_tokens, config.min_latent_tokens or config.num_latent_tokens
    if not least <= header.tokens <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise InputError(f"tokens is {header.tokens}, this tokenizer decodes {expected}")
    if header.coder != "codewords":
        return
    codes = _codes(tokenizer)
    if not codes:
        raise InputError(f"the quantizer is {config.quantizer.kind!r}, which has no codewords; take coder latents")
    if header.top > min(codes, MAX_TOP):
        raise InputError(f"top is {header.top}, expected 1 to {min(codes, MAX_TOP)}")
    if header.bits and code_shape(config.quantizer):
        raise InputError(f"codewords of {config.quantizer.kind!r} have no common weights; take top 1 and bits 0")


def _codes(tokenizer: ImageTokenizer) -> int:
    return getattr(innermost(tokenizer.config.quantizer), "codebook_size", 0)


def _stream() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise InputError("the codec needs constriction; run: pip install 'softvq[codec]'") from error
    library: Any = constriction  # whose submodules no type checker sees
    return library.stream


def _encode_steps(steps: np.ndarray, statistics: np.ndarray | None, bits: int) -> bytes:
    """Encode `[token, dim]` whole steps, after their statistics if they have any."""
    stream = _stream()
    encoder = stream.queue.RangeEncoder()
    if statistics is not None:
        encoder.encode((statistics + BYTE + 1).astype(np.int32).ravel(), stream.model.Uniform(2 * BYTE + 2))
    model = stream.model.QuantizedGaussian(-(2**bits), 2**bits)
    encoder.encode(steps.ravel(), model, *_normal(statistics, steps.shape, bits))
    return encoder.get_compressed().astype("<u4").tobytes()


def _decode_steps(payload: bytes, header: SvqHeader, dim: int) -> np.ndarray:
    stream, shape = _stream(), (header.tokens, dim)
    decoder = _decoder(payload)
    statistics = None
    if header.coder == "latents-fitted":
        statistics = _symbols(decoder, stream.model.Uniform(2 * BYTE + 2), 2 * dim).reshape(2, dim) - BYTE - 1
    model = stream.model.QuantizedGaussian(-(2**header.bits), 2**header.bits)
    steps = _symbols(decoder, model, *_normal(statistics, shape, header.bits)).reshape(shape)
    _check_whole(payload, _encode_steps(steps, statistics, header.bits))
    return steps


def _statistics(latents: np.ndarray) -> np.ndarray:
    """Return whole numbers that stand for the mean and the deviation of every channel, `[2, dim]`."""
    means = np.rint(latents.mean(axis=0) * MEAN_STEPS)
    deviations = np.rint(np.log2(latents.std(axis=0).clip(min=1e-3)) * DEVIATION_STEPS)
    return np.stack([means, deviations]).clip(-BYTE - 1, BYTE).astype(np.int32)


def _normal(statistics: np.ndarray | None, shape: tuple[int, ...], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means and deviations, in steps, of every number: those of the statistics, or 0 and 1 deviation."""
    scale = 2**bits / REACH
    if statistics is None:
        statistics = np.zeros((2, shape[1]), dtype=np.int32)
    doublings, steps = np.divmod(statistics[1], DEVIATION_STEPS)
    mean, deviation = statistics[0] / MEAN_STEPS * scale, np.ldexp(ROOTS[steps], doublings) * scale
    means, deviations = (np.broadcast_to(row, shape).ravel().astype(np.float64) for row in (mean, deviation))
    return means, deviations


def _encode_codewords(tokenizer: ImageTokenizer, pixels: Tensor, header: SvqHeader) -> bytes:
    """Encode each token's codewords; and with bits the weights, in units of the largest, and the mixture's length."""
    indices, weights = (found[0, : header.tokens] for found in tokenizer.top_codewords(pixels, header.top))
    codes = indices.cpu().numpy()
    if header.bits:
        most = 2**header.bits - 1
        ratios = (weights / weights[:, :1] * most).round()
        mixtures = _mixtures(tokenizer, indices, ratios)
        latents = tokenizer.encode_raw(pixels)[0, : header.tokens]
        lengths = (latents * mixtures).sum(-1) / mixtures.square().sum(-1).clamp(min=1e-12)
        levels = (lengths.clamp(0, 1) * most).round()
        symbols = torch.cat([ratios[:, 1:].flatten(), levels]).nan_to_num().cpu().numpy().astype(np.int32)
        return _packed_codewords(codes, symbols, _codes(tokenizer), most)
    return _packed_codewords(codes, None, _codes(tokenizer), 0)


def _packed_codewords(codes: np.ndarray, weights: np.ndarray | None, size: int, most: int) -> bytes:
    """Encode whole numbers below the codebook's size, then such from 0 to the largest weight, if there are weights."""
    stream = _stream()
    encoder = stream.queue.RangeEncoder()
    encoder.encode(codes.astype(np.int32).ravel(), stream.model.Uniform(size))
    if weights is not None:
        encoder.encode(weights.astype(np.int32), stream.model.Uniform(most + 1))
    return encoder.get_compressed().astype("<u4").tobytes()


def _decode_codewords(tokenizer: ImageTokenizer, payload: bytes, header: SvqHeader) -> Float[Tensor, "token dim"]:
    stream, decoder = _stream(), _decoder(payload)
    config, device = tokenizer.config, tokenizer.latent_mean.device
    shape = (header.tokens, *code_shape(config.quantizer), header.top)
    codes = _symbols(decoder, stream.model.Uniform(_codes(tokenizer)), math.prod(shape)).reshape(shape)
    indices = torch.from_numpy(codes.astype(np.int64)).to(device)
    if not header.bits:
        _check_whole(payload, _packed_codewords(codes, None, _codes(tokenizer), 0))
        return _mixtures(tokenizer, indices, torch.ones(header.tokens, header.top, device=device))
    most = 2**header.bits - 1
    found = _symbols(decoder, stream.model.Uniform(most + 1), header.tokens * header.top)
    _check_whole(payload, _packed_codewords(codes, found, _codes(tokenizer), most))
    levels = torch.from_numpy(found.astype(np.float32)).to(device)
    ratios = levels[: header.tokens * (header.top - 1)].reshape(header.tokens, header.top - 1)
    ratios = torch.cat([torch.full_like(levels[-header.tokens :, None], most), ratios], dim=1)
    return _mixtures(tokenizer, indices, ratios) * levels[-header.tokens :, None] / most


def _mixtures(
    tokenizer: ImageTokenizer, indices: Int[Tensor, "token *stage top"], ratios: Float[Tensor, "token top"]
) -> Float[Tensor, "token dim"]:
    """Return the mean of each token's codewords, by their weights."""
    most = tokenizer.config.num_latent_tokens
    each = indices.movedim(-1, 0)
    rest = each.new_zeros(len(each), most - each.shape[1], *each.shape[2:])  # whose codebook it is depends on all
    quantizer: Any = tokenizer.quantizer
    codewords = quantizer.lookup(torch.cat([each, rest], dim=1))[:, : each.shape[1]]
    weights = ratios / ratios.sum(dim=1, keepdim=True)
    return (codewords * weights.T[..., None]).sum(dim=0)


def _decoder(payload: bytes) -> Any:
    return _stream().queue.RangeDecoder(np.frombuffer(payload, dtype="<u4").astype(np.uint32))


def _symbols(decoder: Any, model: Any, *given: Any) -> np.ndarray:
    try:
        return decoder.decode(model, *given)
    except AssertionError as error:  # how constriction says that no encoder wrote this
        raise InputError("holds what no encoder wrote; fetch it again") from error


def _check_whole(payload: bytes, expected: bytes) -> None:
    """Refuse what decodes to a picture, but is not what that picture is encoded as: a range coder takes any bytes."""
    if payload != expected:
        raise InputError("holds more or less than its picture; fetch it again")
