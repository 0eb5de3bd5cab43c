"""The sizes of DiT, SiT and MAR by name."""

import dataclasses
from typing import Any

from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.diffusion import DiffusionConfig
from softvq.generators.flow import FlowConfig
from softvq.generators.mar import MARConfig
from softvq.generators.transformer import TransformerConfig

__all__ = ["GENERATORS", "generator_preset"]

TRANSFORMERS = {
    "tiny": TransformerConfig(width=128, depth=4, num_heads=4),
    "xs": TransformerConfig(width=224, depth=6, num_heads=4),
    "s": TransformerConfig(width=384, depth=12, num_heads=6),
    "b": TransformerConfig(width=768, depth=12, num_heads=12),
    "l": TransformerConfig(width=1024, depth=24, num_heads=16),
    "xl": TransformerConfig(width=1152, depth=28, num_heads=16),
}
"""arXiv:2212.09748, table 1; `tiny` and `xs` are ours."""
MARS = {
    "tiny": MARConfig(
        width=128, encoder_depth=2, decoder_depth=2, num_heads=4, head_width=128, head_depth=2, condition_tokens=4
    ),
    "s": MARConfig(
        width=384, encoder_depth=6, decoder_depth=6, num_heads=6, head_width=512, head_depth=3, condition_tokens=16
    ),
    "b": MARConfig(width=768, encoder_depth=12, decoder_depth=12, num_heads=12, head_width=1024, head_depth=6),
    "l": MARConfig(width=1024, encoder_depth=16, decoder_depth=16, num_heads=16, head_width=1280, head_depth=8),
    "h": MARConfig(width=1280, encoder_depth=20, decoder_depth=20, num_heads=16, head_width=1536, head_depth=12),
}
"""arXiv:2406.11838, section 5 and its released sizes; `tiny` and `s` are ours."""
DIFFUSION = DiffusionConfig(schedule="cosine", predicts="velocity")
"""At the noisy end of the cosine schedule a small error in the noise is a huge one in the data, unless it is predicted
as a velocity; the papers predict the noise, and train long."""
KINDS = {"sit": TRANSFORMERS, "dit": TRANSFORMERS, "mar": MARS}
GENERATORS = tuple(f"{kind}-{size}" for kind, sizes in KINDS.items() for size in sizes)
"""Names of the presets."""


def generator_preset(name: str, **fields: Any) -> GeneratorConfig:
    """Return a generator by name.

    Args:
        name: One of `GENERATORS`, for example `sit-xl`, `dit-s` or `mar-b`.
        **fields: Those of `GeneratorConfig` that do not depend on the size; `num_tokens` and `latent_dim` are needed.

    Returns:
        The config: SiT on the linear path; DiT and MAR with a cosine schedule, velocities and a learned variance.

    Raises:
        InputError: If there is no such preset.
    """
    if name not in GENERATORS:
        raise InputError(f"there is no generator {name!r}, expected one of {', '.join(GENERATORS)}")
    kind, size = name.split("-")
    network = KINDS[kind][size]
    process = FlowConfig() if kind == "sit" else DIFFUSION
    return dataclasses.replace(GeneratorConfig(num_tokens=1, latent_dim=1), network=network, process=process, **fields)
