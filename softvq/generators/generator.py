"""A generator of latents: network and process, its loss, its samples, and its folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from softvq import hub
from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.generators import released, unmasking
from softvq.generators.conditioning import Condition
from softvq.generators.config import GeneratorConfig
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow
from softvq.generators.guidance import Guidance, Network, guided
from softvq.generators.mar import MAR, MARConfig
from softvq.generators.process import Draw, Watch, watched
from softvq.generators.recipe import SamplingRecipe, resolved
from softvq.generators.sampling import SAMPLERS, check_sampler, times_for
from softvq.generators.transformer import LatentTransformer
from softvq.randomness import fold_in, normal, uniform

__all__ = ["LatentGenerator", "TokenizerReference"]

HIDE, NOISE, TIME, SOLVER = 1, 2, 3, 16
ALIKE = ("num_tokens", "latent_dim", "process", "condition", "num_classes", "condition_dim")
"""Fields in which a guide is like what it guides."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerReference:
    """The tokenizer whose latents a generator makes."""

    name: str | None = None
    """A folder, perhaps relative to the generator's, or a repository."""
    fingerprint: str | None = None
    """`ImageTokenizer.latent_fingerprint()`; null in released generators, which do not say."""


class LatentGenerator(nn.Module):
    """Makes `[batch, token, dim]` latents from noise and conditions.

    Args:
        config: The architecture.
        classes: Names of the classes; empty if they have none.
        tokenizer: Whose latents it makes.
        sampling: How it is sampled unless asked otherwise.

    Raises:
        InputError: If the names are not as many as the classes.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        classes: tuple[str, ...] = (),
        tokenizer: TokenizerReference | None = None,
        sampling: SamplingRecipe | None = None,
    ) -> None:
        super().__init__()
        if classes and len(classes) != config.num_classes:
            raise InputError(f"there are {len(classes)} class names, expected num_classes ({config.num_classes})")
        if len(set(classes)) < len(classes):
            raise InputError("two classes have the same name; every class needs its own")
        self.config, self.classes = config, tuple(classes)
        self.tokenizer = tokenizer or TokenizerReference()
        self.sampling = sampling or SamplingRecipe()
        self.process = (
            Diffusion(config.process) if isinstance(config.process, DiffusionConfig) else Flow(config.process)
        )
        tokens, dim, network = config.num_tokens, config.latent_dim, config.network
        condition = Condition(config.condition, config.num_classes, config.condition_dim, network.width)
        if isinstance(network, MARConfig):
            self.network = MAR(network, tokens, dim, condition, self.process)
        else:
            self.network = LatentTransformer(network, tokens, dim, self.process.output_dim(dim), condition)

    def losses(
        self,
        latents: Float[Tensor, "batch token dim"],
        condition: Shaped[Tensor, "batch *conditiondim"],
        keys: Int64[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Return the named losses of each image, whose sum is to be minimised.

        Args:
            latents: Normalised, as `ImageTokenizer.encode` gives them.
            condition: Class numbers, or embeddings.
            keys: One for each image, which decide time, noise and whether its condition is hidden.

        Returns:
            Means over the tokens, and for MAR over the masked ones.
        """
        null = self._hidden(keys)
        if isinstance(self.network, MAR):
            return self.network.losses(latents, condition, null, keys)
        time = self.process.draw_times(fold_in(keys, TIME))
        return self._losses_at(latents, condition, null, keys, time)

    @torch.no_grad()
    def losses_by_noise(
        self,
        latents: Float[Tensor, "batch token dim"],
        condition: Shaped[Tensor, "batch *conditiondim"],
        keys: Int64[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, ""]]:
        """Return mean losses at four amounts of noise, which can be compared between runs as their mean cannot.

        Args:
            latents: As for `losses`.
            condition: Nothing of it is hidden.
            keys: As for `losses`.

        Returns:
            The losses at 1/8, 3/8, 5/8 and 7/8 of the way from data to noise; of MAR, nothing.
        """
        if isinstance(self.network, MAR):
            return {}
        found, null = {}, torch.zeros_like(keys, dtype=torch.bool)
        for eighths in (1, 3, 5, 7):
            time = torch.full_like(keys, self.process.time_at(eighths / 8), dtype=torch.float32)
            losses = self._losses_at(latents, condition, null, keys, time)
            found[f"loss_at_{eighths}_8"] = torch.stack(list(losses.values())).sum(dim=0).mean()
        return found

    @torch.no_grad()
    def sample(
        self,
        condition: Shaped[Tensor, "batch *conditiondim"],
        keys: Int64[Tensor, " batch"],
        recipe: SamplingRecipe | None = None,
        *,
        guide: "LatentGenerator | None" = None,
        watch: Watch | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Make latents; those of an image depend on its condition and key alone, not on its batch.

        Args:
            condition: Class numbers, or embeddings, on the generator's device.
            keys: One for each image.
            recipe: How; by default the one stored with the generator.
            guide: A worse generator of the same latents for autoguidance (arXiv:2406.02507): `recipe.guidance` then
                leads away from it instead of from the null class.
            watch: Called in every step with its number, from 1, and the latents as far as they can be told then. What
                it raises ends the sampling.

        Returns:
            Normalised latents in float32, as `ImageTokenizer.decode` takes them.

        Raises:
            InputError: If the generator cannot be sampled so.
        """
        recipe = self.checked(recipe, guide)
        temperature = recipe.temperature
        if isinstance(self.network, MAR):
            return unmasking.sample(
                self.network,
                condition,
                keys,
                steps=recipe.steps,
                sampler=SAMPLERS[recipe.sampler],
                times=times_for(recipe.sampler, self.process, recipe.head_steps, recipe.shift),
                guidance=recipe.guidance,
                temperature=temperature,
                watch=watch,
            )
        shape = (self.config.num_tokens, self.config.latent_dim)

        def draw(step: int) -> Tensor:
            return temperature * normal(fold_in(keys, SOLVER + 1 + step), *shape)

        noise = temperature * normal(fold_in(keys, SOLVER), *shape)
        return self.solve(condition, noise, recipe, draw, guide=guide, watch=watch)

    def solve(
        self,
        condition: Shaped[Tensor, "batch *conditiondim"],
        noise: Float[Tensor, "batch token dim"],
        recipe: SamplingRecipe,
        draw: Draw,
        *,
        guide: "LatentGenerator | None" = None,
        watch: Watch | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Follow the sampler from noise that is given; `sample` draws it.

        Args:
            condition: As for `sample`.
            noise: Its deviation is the recipe's temperature.
            recipe: As `checked` returns it; not of MAR.
            draw: Noise of each step, of the same deviation, for samplers that add some.
            guide: As for `sample`.
            watch: As for `sample`.

        Returns:
            Normalised latents in float32.
        """
        times = times_for(recipe.sampler, self.process, recipe.steps, recipe.shift)
        predict = guided(
            self._bound(condition), self.process, recipe.guidance, None if guide is None else guide._bound(condition)
        )
        if watch is not None:
            predict = watched(predict, watch)
        return SAMPLERS[recipe.sampler](predict, noise, times, self.process, draw)

    def checked(self, recipe: SamplingRecipe | None = None, guide: "LatentGenerator | None" = None) -> SamplingRecipe:
        """Return a recipe as `sample` carries it out.

        Args:
            recipe: As for `sample`.
            guide: As for `sample`.

        Returns:
            The recipe with nothing left to be chosen.

        Raises:
            InputError: If the generator cannot be sampled so.
        """
        recipe = recipe or self.sampling
        if guide is None:
            recipe = resolved(recipe, self.config)
        else:  # which needs no null class
            unguided = dataclasses.replace(recipe, guidance=Guidance())
            recipe = dataclasses.replace(resolved(unguided, self.config), guidance=recipe.guidance)
            own, other = (self.config, guide.config)
            same = all(getattr(own, name) == getattr(other, name) for name in ALIKE) and self.classes == guide.classes
            prints = {self.tokenizer.fingerprint, guide.tokenizer.fingerprint} - {None}
            if not same or len(prints) > 1 or isinstance(self.network, MAR) or isinstance(guide.network, MAR):
                raise InputError(
                    "the guide makes other latents, has other classes, or is of another kind; give one like the "
                    "generator, trained less"
                )
        check_sampler(recipe.sampler, self.process)
        return recipe

    def fingerprint(self) -> str:
        """Return a SHA-256 over the config and every weight."""
        return hub.fingerprint(to_dict(self.config), self.state_dict())

    def save_pretrained(self, folder: Path | str, *, facts: Mapping[str, str] | None = None) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`.

        Args:
            folder: Made if need be; files in it of these names are replaced, but a card is left as it is.
            facts: For the card, see `softvq.hub.model_card`.

        Raises:
            RunError: If the files cannot be written; what was there before is untouched.
        """
        config: dict[str, Any] = {
            "model": to_dict(self.config),
            "sampling": to_dict(self.sampling),
            "classes": list(self.classes),
            "tokenizer": to_dict(self.tokenizer),
        }
        hub.save_folder(folder, kind="generator", config=config, tensors=self.state_dict(), card=_card(self, facts))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the generator to a Hugging Face repository, made if need be; return its address."""
        return hub.push(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(cls, name_or_folder: Path | str, *, revision: str | None = None) -> "LatentGenerator":
        """Load a generator, in evaluation mode on the CPU, strictly and from safetensors only.

        Args:
            name_or_folder: A folder written by `save_pretrained`, or a repository such as
                `SoftVQVAE/sit-xl_softvq-l-64`.
            revision: Branch, tag or commit of the repository.

        Returns:
            The generator.

        Raises:
            InputError: If it cannot be found, or a tensor is missing, unexpected, of another shape, or not finite.
        """
        config, tensors, where = hub.load_folder(name_or_folder, kind="generator", revision=revision)
        if released.is_released(config):
            config, tensors = released.convert(config, tensors, where)
        stored = from_dict(_Stored, config, f"{where}/config.json")
        with torch.device("meta"):
            generator = cls(stored.model, classes=stored.classes, tokenizer=stored.tokenizer, sampling=stored.sampling)
        hub.load_strictly(generator, tensors, where)
        return generator.eval()

    def _hidden(self, keys: Tensor) -> Bool[Tensor, " batch"]:
        return uniform(fold_in(keys, HIDE)) < self.config.label_dropout

    def _losses_at(
        self, latents: Tensor, condition: Tensor, null: Tensor, keys: Tensor, time: Tensor
    ) -> dict[str, Float[Tensor, " batch"]]:
        clean = latents.float()
        noise = normal(fold_in(keys, NOISE), *latents.shape[1:])
        noisy = self.process.noisy(clean, noise, time)
        output = self.network(noisy, self.process.network_time(time), condition, null)
        losses = self.process.losses(output, clean, noise, time)
        return {name: value.mean(dim=1) for name, value in losses.items()}

    def _bound(self, condition: Tensor) -> Network:
        """Return the network with the conditions in it, for as many copies of the batch as the solver wants."""

        def network(noisy: Tensor, time: Tensor, null: Tensor) -> Tensor:
            copies = int(noisy.shape[0] // condition.shape[0])  # a number, also where a program is traced
            return self.network(noisy, self.process.network_time(time), torch.cat([condition] * copies), null)

        return network


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    model: GeneratorConfig
    sampling: SamplingRecipe = dataclasses.field(default_factory=SamplingRecipe)
    classes: tuple[str, ...] = ()
    tokenizer: TokenizerReference = dataclasses.field(default_factory=TokenizerReference)


def _card(generator: LatentGenerator, facts: Mapping[str, str] | None) -> str:
    config, tokenizer = generator.config, generator.tokenizer
    parameters = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    names = ", ".join(generator.classes[:50]) + (", ..." if len(generator.classes) > 50 else "")
    said = {"Classes": f"{names}."} if names else {}
    if tokenizer.name is not None:
        said["Tokenizer"] = f"`{tokenizer.name}`, whose latents are `{(tokenizer.fingerprint or 'unknown')[:12]}`."
    return hub.model_card(
        "generator",
        ["image-generation", config.process.kind],
        f"Makes {config.num_tokens} tokens of {config.latent_dim} channels, which a tokenizer turns into an image;\n"
        f"{config.network.kind} with {config.process.kind}, {parameters:.1f} M parameters.",
        """from softvq import GenerationPipeline

pipeline = GenerationPipeline.from_pretrained("this-folder-or-repository")
images = pipeline([0, 1], seed=0)""",
        {**said, **(facts or {})},
    )
