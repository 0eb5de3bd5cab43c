"""The generators released with the paper: their flat config and their tensor names, translated in this one table."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softvq.errors import InputError

__all__ = ["convert", "is_released"]

PREFIXES = {
    "pos_embed": "network.positions",
    "x_embedder.": "network.to_tokens.",
    "t_embedder.": "network.time_embedding.",
    "y_embedder.embedding_table.": "network.condition.table.",
    "blocks.": "network.blocks.",
    "final_layer.linear.": "network.to_output.",
    "final_layer.adaLN_modulation.1.": "network.final_modulation.",
}
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
NAME = re.compile(r"(.*)/(?:sit|dit)-xl_(softvq-.+)")


def is_released(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is the flat one of the released repositories."""
    return "hidden_size" in config and "in_channels" in config


def convert(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a released folder into ours.

    An output twice as wide as the latents is DiT's, with noise and a learned variance on the cosine schedule; one as
    wide is SiT's velocity. SiT's config names a path that its training did not use (`path_type: edm`); the published
    command trains on the linear path, so that is taken, and only stochastic samplers depend on it.

    Args:
        config: As its `config.json` holds it.
        tensors: By the released names.
        where: What to call the folder in errors; from a repository's name that of its tokenizer is read.

    Returns:
        Config and tensors as `LatentGenerator` takes them.

    Raises:
        InputError: If a field of the config describes something this library does not build.
    """
    for field, expected in (("vae_1d", True), ("patch_size", 1), ("qk_norm", False)):
        if config.get(field, expected) != expected:
            raise InputError(f"{where}/config.json: {field} is {config[field]!r}, expected {expected!r}")
    ours = {}
    for name, tensor in tensors.items():
        plain = WRAPPERS.sub("", name)
        prefix = next((old for old in PREFIXES if plain.startswith(old)), None)
        if prefix is None:
            raise InputError(f"{where}: the weights hold {name!r}, which no released generator has")
        ours[(PREFIXES[prefix] + plain[len(prefix) :]).replace(".adaLN_modulation.1.", ".modulation.")] = tensor
    dim, width = _field(config, "in_channels", where), _field(config, "hidden_size", where)
    output = ours.get("network.to_output.weight")
    is_dit = output is not None and len(output) == 2 * dim
    flow, diffusion = {"kind": "flow", "path": "linear"}, {"kind": "diffusion", "schedule": "cosine"}
    tokenizer = NAME.fullmatch(where)
    guidance = {"scale": 1.75, "interval": [0.0, 1.0] if is_dit else [0.0, 0.7]}
    return {
        "model": {
            "num_tokens": _field(config, "input_size", where),
            "latent_dim": dim,
            "num_classes": _field(config, "num_classes", where, 1000),
            "network": {
                "kind": "transformer",
                "width": width,
                "depth": _field(config, "depth", where),
                "num_heads": _field(config, "num_heads", where),
            },
            "process": diffusion if is_dit else flow,
        },
        "sampling": {"sampler": "ddpm" if is_dit else "heun", "steps": 250 if is_dit else 50, "guidance": guidance},
        "tokenizer": {"name": f"{tokenizer[1]}/{tokenizer[2]}" if tokenizer else None},
    }, ours


def _field(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}/config.json: {name} is {value!r}, expected a whole number")
    return value
