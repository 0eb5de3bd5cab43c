"""A recipe: everything that determines a generator's training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from softvq.config import merged, to_dict
from softvq.data.folder import DataConfig
from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.presets import generator_preset
from softvq.generators.recipe import SamplingRecipe, resolved
from softvq.training.optim import OptimConfig
from softvq.training.train_config import TrainConfig

__all__ = ["GeneratorRunConfig", "expand_generator"]

DIT_OPTIM = OptimConfig(betas=(0.9, 0.999), weight_decay=0.0, schedule="constant")
"""arXiv:2212.09748, section 4."""
SHAPE = ("num_tokens", "latent_dim", "num_classes")
"""Fields of the model that the latents decide."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorRunConfig:
    """Everything that determines a generator's training."""

    model: GeneratorConfig
    """The architecture."""
    latents: str | None = None
    """Folder that `softvq cache-latents` wrote; null encodes photographs on the fly."""
    flip: bool = True
    """Take the mirrored view of half of the cached images, where the cache has them."""
    tokenizer: str | None = None
    """Folder or repository of the tokenizer; null takes the one the cache names. Without a cache it is needed."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(crop="center"))
    """The photographs to train on, without a cache."""
    optim: OptimConfig = DIT_OPTIM
    """How to update; as in DiT by default, also in the fields of it that a recipe leaves out."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How long, and how often to save."""
    sampling: SamplingRecipe = dataclasses.field(default_factory=SamplingRecipe)
    """Of the sample grids, and what is stored with the weights as the way to sample them."""
    seed: int = 0
    """Decides the initial weights, the order of the images, noise, times, and everything else that is drawn."""

    def __post_init__(self) -> None:
        """Refuse combinations that do not fit."""
        if self.latents is not None and self.data.path is not None:
            raise InputError("latents and data.path are both set; the images are either cached or encoded on the fly")
        if self.model.condition == "embedding":
            raise InputError("model.condition is 'embedding', which needs a loop of your own; see docs/generators.md")
        resolved(self.sampling, self.model)


def expand_generator(data: Mapping[str, Any], shape: Mapping[str, int]) -> dict[str, Any]:
    """Return the plain data of a run with its preset written out, and what the latents decide filled in.

    Args:
        data: A run as YAML gives it; `model: {preset: sit-s, ...}`, whose other fields overrule the preset.
        shape: `num_tokens`, `latent_dim`, and `num_classes` where the images have classes.

    Returns:
        What `from_dict(GeneratorRunConfig, ...)` takes.

    Raises:
        InputError: If there is no such preset, or a field contradicts the latents.
    """
    model = data.get("model", {})
    if not isinstance(model, dict):
        return dict(data)
    for name in SHAPE[:2]:
        if name in model and name in shape and model[name] != shape[name]:
            raise InputError(f"model.{name} is {model[name]!r}, but the latents have {shape[name]}; leave it out")
    fields = {name: value for name, value in model.items() if name != "preset"}
    defaults = {"optim": to_dict(DIT_OPTIM), "data": {"crop": "center"}}
    data = merged({name: group for name, group in defaults.items() if name in data}, data)
    given: dict[str, Any] = {name: shape[name] for name in SHAPE if name in shape}
    if "num_classes" not in given and "condition" not in fields:
        given["condition"] = "none"
        data = merged(data, {"sampling": {"guidance": {"scale": 1.0}}})  # there is nothing to guide by
    if "preset" not in model:
        return {**data, "model": {**given, **fields}}
    if not isinstance(model["preset"], str):
        raise InputError(f"model.preset is {model['preset']!r}, expected a name such as 'sit-s'")
    base = {name: value for name, value in to_dict(generator_preset(model["preset"])).items() if name not in SHAPE[:2]}
    return {**data, "model": merged({**base, **given}, fields)}
