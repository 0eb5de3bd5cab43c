"""The tokenizers released with the paper: their flat config and their tensor names, translated in this one table."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softvq.errors import InputError

__all__ = ["convert", "is_released"]

PREFIXES = {
    "encoder.model.": "encoder.",
    "decoder.model.": "decoder.",
    "decoder.to_pixel.model.": "decoder.to_pixels.",
    "quant_conv.": "to_latents.",
    "post_quant_conv.": "from_latents.",
    "quantize.embedding.weight": "quantizer.codebook",
    "quantize.embedding": "quantizer.codebook",
}
OWN = ("encoder.latent_tokens", "encoder.latent_pos_embed", "decoder.mask_token", "decoder.latent_pos_embed")
LEFT_OUT = re.compile(
    r"decoder\.model\.patch_embed\.proj\.(weight|bias)|quantize\.codebook_used|repa_model\..+|projection\.[024]\.(weight|bias)"
)
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def is_released(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is the flat one of the released repositories."""
    return "codebook_embed_dim" in config and "encoder_model" in config


def convert(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a released folder into ours.

    The kind of tokenizer is told by its tensors: a codebook of three dimensions is SoftVQ, of two VQ; without one,
    twice as many channels before the quantizer as after it are KL, as many a plain autoencoder. The decoder's unused
    patch embedding, the usage counter, the alignment teacher and its projector are left out; nothing else is
    forgiven.

    Args:
        config: As its `config.json` holds it.
        tensors: By the released names.
        where: What to call the folder in errors.

    Returns:
        Config and tensors as `ImageTokenizer` takes them.

    Raises:
        InputError: If a field of the config describes something this library does not build.
    """
    for field, expected in (("enc_type", "vit"), ("dec_type", "vit"), ("to_pixel", "linear"), ("use_rope", False)):
        if config.get(field, expected) != expected:
            raise InputError(f"{where}/config.json: {field} is {config[field]!r}, expected {expected!r}")
    ours = {}
    for name, tensor in tensors.items():
        if LEFT_OUT.fullmatch(name):
            continue
        prefix = next((old for old in sorted(PREFIXES, key=len, reverse=True) if name.startswith(old)), None)
        if prefix is None and name not in OWN:
            raise InputError(f"{where}: the weights hold {name!r}, which no released tokenizer has")
        ours[name if prefix is None else PREFIXES[prefix] + name[len(prefix) :]] = tensor
    latent_dim = _field(config, "codebook_embed_dim", where)
    if not 1 <= latent_dim <= 4096:
        raise InputError(f"{where}/config.json: codebook_embed_dim is {latent_dim}, expected 1 to 4096")
    quantizer, codebook = _quantizer(config, ours, latent_dim, where)
    if codebook is not None:
        ours["quantizer.codebook"] = codebook
    mean, std = _number(config, "vq_mean", where, 0.0), _number(config, "vq_std", where, 1.0)
    if std <= 0:
        raise InputError(
            f"{where}/config.json: vq_mean is {mean} and vq_std {std}, expected finite numbers, vq_std above 0"
        )
    ours["latent_mean"] = torch.full((latent_dim,), mean)
    ours["latent_std"] = torch.full((latent_dim,), std)
    return {
        "image_size": _field(config, "image_size", where),
        "patch_size": _field(config, "enc_patch_size", where, 16),
        "num_latent_tokens": _field(config, "num_latent_tokens", where),
        "latent_dim": latent_dim,
        "encoder": _vit(config, "encoder_model", where),
        "decoder": _vit(config, "decoder_model", where),
        "quantizer": quantizer,
    }, ours


def _quantizer(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], latent_dim: int, where: str
) -> tuple[dict[str, Any], Tensor | None]:
    codebook = tensors.get("quantizer.codebook")
    entropy_weight = _number(config, "entropy_loss_ratio", where, 0.0)
    if codebook is None:
        pre = tensors.get("to_latents.weight")
        twice = pre is not None and len(pre) == 2 * latent_dim
        return (
            {"kind": "kl", "kl_weight": _number(config, "kl_loss_weight", where, 1e-6)} if twice else {"kind": "none"}
        ), None
    if not config.get("codebook_l2_norm", True):
        raise InputError(
            f"{where}/config.json: codebook_l2_norm is false, expected true, as in every released tokenizer"
        )
    size = _field(config, "codebook_size", where)
    if codebook.ndim == 2:
        weights = {
            "codebook_weight": _number(config, "vq_loss_ratio", where, 1.0),
            "commitment_weight": _number(config, "commit_loss_beta", where, 0.25),
            "entropy_weight": entropy_weight,
        }
        return {"kind": "vq", "codebook_size": size, **weights}, codebook[None]
    softness = {"temperature": _number(config, "tau", where, 0.07), "entropy_weight": entropy_weight}
    num_codebooks = _field(config, "num_codebooks", where, 1)
    return {"kind": "softvq", "codebook_size": size, "num_codebooks": num_codebooks, **softness}, codebook


def _vit(config: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    size = re.match(r"vit_(small|base|large)_patch", str(config.get(field)))
    if size is None:
        raise InputError(
            f"{where}/config.json: {field} is {config.get(field)!r}, expected a small, base or large timm ViT"
        )
    width, depth, num_heads = SIZES[size[1]]
    return {"width": width, "depth": depth, "num_heads": num_heads, "layer_scale_init": 1e-5, "init": "released"}


def _number(config: Mapping[str, Any], name: str, where: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{where}/config.json: {name} is {value!r}, expected a finite number")
    return float(value)


def _field(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}/config.json: {name} is {value!r}, expected a whole number")
    return value
