"""How images are sampled: the choices that make a published figure repeatable, stored with the weights."""

import dataclasses
from typing import Literal

from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow
from softvq.generators.guidance import Guidance
from softvq.generators.mar import MARConfig
from softvq.generators.sampling import times_for

__all__ = ["SamplerName", "SamplingRecipe", "resolved"]

SamplerName = Literal["auto", "euler", "heun", "ab2", "euler_maruyama", "dpm++", "dpm++_sde", "ddpm", "ddim"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRecipe:
    """Everything that decides an image beside the weights, the condition and the seed."""

    sampler: SamplerName = "auto"
    """Solver of the process; auto is heun for SiT, ddim for DiT, and in MAR's head euler for a flow, ddpm otherwise."""
    steps: int = 50
    """Steps of the solver; of MAR, in which its tokens are revealed."""
    head_steps: int = 50
    """Steps of the solver in MAR's head, for each token; other generators have no use for it."""
    shift: float = 1.0
    """Of a flow's times: above 1 they lie closer at the noisy end."""
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    """How much the condition is overdrawn, and when."""
    temperature: float = 1.0
    """Deviation of all noise that is drawn; below 1 images are more alike."""
    ema: str | None = None
    """Which average of the weights these are, for people."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, value in (("steps", self.steps), ("head_steps", self.head_steps)):
            if not 1 <= value <= 10_000:
                raise InputError(f"{name} is {value}, expected 1 to 10000")
        if not 0 < self.shift <= 1000:
            raise InputError(f"shift is {self.shift}, expected above 0 and at most 1000")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"temperature is {self.temperature}, expected 0 to 10")


def resolved(recipe: SamplingRecipe, config: GeneratorConfig) -> SamplingRecipe:
    """Return a recipe with everything left to be chosen chosen, and checked against a generator.

    Args:
        recipe: Perhaps with `sampler: auto`.
        config: The generator it is for.

    Returns:
        The recipe that is carried out.

    Raises:
        InputError: If the generator cannot be sampled so.
    """
    mar, diffusion = isinstance(config.network, MARConfig), isinstance(config.process, DiffusionConfig)
    if recipe.sampler == "auto":
        chosen: SamplerName = ("ddpm" if mar else "ddim") if diffusion else ("euler" if mar else "heun")
        recipe = dataclasses.replace(recipe, sampler=chosen)
    if mar and recipe.steps > config.num_tokens:
        raise InputError(f"steps is {recipe.steps}, expected at most {config.num_tokens}, the tokens MAR reveals")
    if recipe.guidance.scale != 1 and not config.guidable:
        why = "has no condition" if config.condition == "none" else "was trained without label_dropout"
        raise InputError(f"guidance is {recipe.guidance.scale:g}, but the generator {why}; leave it at 1")
    process = Diffusion(config.process) if isinstance(config.process, DiffusionConfig) else Flow(config.process)
    times_for(recipe.sampler, process, recipe.head_steps if mar else recipe.steps, recipe.shift)
    return recipe
