"""A generator's architecture: the latents it makes, what it is asked for, its network, and its process."""

import dataclasses
from typing import Literal

from softvq.errors import InputError
from softvq.generators.diffusion import DiffusionConfig
from softvq.generators.flow import FlowConfig
from softvq.generators.mar import MARConfig
from softvq.generators.transformer import TransformerConfig

__all__ = ["GeneratorConfig"]

MAX_CLASSES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """SiT is a transformer with a flow, DiT one with a diffusion, MAR a network of its own with either in its head."""

    num_tokens: int
    """Latent tokens of one image."""
    latent_dim: int
    """Numbers in each."""
    condition: Literal["class", "embedding", "none"] = "class"
    """What an image is asked for by."""
    num_classes: int = 1000
    """Of `condition: class`; the null class is number `num_classes`."""
    condition_dim: int = 768
    """Length of the vectors of `condition: embedding`."""
    label_dropout: float = 0.1
    """Share of training samples whose condition is hidden; without it there is no guidance."""
    network: TransformerConfig | MARConfig = dataclasses.field(default_factory=TransformerConfig)
    """The transformer, or MAR's pair of them with its head."""
    process: FlowConfig | DiffusionConfig = dataclasses.field(default_factory=FlowConfig)
    """How noise becomes latents."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, value in (("num_tokens", self.num_tokens), ("latent_dim", self.latent_dim)):
            if not 1 <= value <= 1 << 16:
                raise InputError(f"{name} is {value}, expected 1 to {1 << 16}")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise InputError(f"num_classes is {self.num_classes}, expected 1 to {MAX_CLASSES}")
        if not 1 <= self.condition_dim <= 1 << 16:
            raise InputError(f"condition_dim is {self.condition_dim}, expected 1 to {1 << 16}")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout is {self.label_dropout}, expected at least 0 and below 1")

    @property
    def guidable(self) -> bool:
        """Whether it learned to work without its condition, as guidance needs."""
        return self.condition != "none" and self.label_dropout > 0
