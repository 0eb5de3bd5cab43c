"""A recipe: everything that determines a tokenizer's training, and the task it describes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from softvq.backbones import FrozenBackbone, compute_dtype, load_backbone
from softvq.config import flat, merged, to_dict
from softvq.data.folder import DataConfig
from softvq.errors import InputError
from softvq.losses.perceptual import load_perceptual
from softvq.losses.semantic import SemanticDistance
from softvq.randomness import manual_seed
from softvq.tokenizers.alignment import AlignmentConfig, check_alignment
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import FREE_FIELDS, TokenizerConfig
from softvq.tokenizers.corruption import CorruptionConfig
from softvq.tokenizers.presets import preset
from softvq.tokenizers.quantizers import innermost
from softvq.training.adversary import Adversary
from softvq.training.optim import OptimConfig, copy_named
from softvq.training.tokenizer_task import LossConfig, TokenizerTask
from softvq.training.train_config import TrainConfig

__all__ = ["TokenizerRunConfig", "build_task", "expand_preset", "idle_settings"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRunConfig:
    """Everything that determines a tokenizer's training."""

    model: TokenizerConfig
    """The architecture."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The photographs to train on."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """What to minimise."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """How to update."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How long, and how often to save."""
    corruption: CorruptionConfig = dataclasses.field(default_factory=CorruptionConfig)
    """What training hides from the tokenizer."""
    start_from: str | None = None
    """Folder or repository of a tokenizer of the same architecture to start from; null starts anew."""
    decoder_only: bool = False
    """Train the decoder alone: encoder and quantizer stay as they are in `start_from`, and its latents stay valid."""
    held_out: str | None = None
    """Folder of photographs for the sample grids, which show the first; null takes the training set's."""
    seed: int = 0
    """Decides the initial weights, the order of the photographs, crops, flips, and everything else that is drawn."""

    def __post_init__(self) -> None:
        """Refuse combinations that do not fit."""
        size, smaller = self.model.image_size, self.loss.perceptual_size
        if smaller is not None and (size % smaller or smaller > size):
            raise InputError(f"loss.perceptual_size is {smaller}, expected a divisor of model.image_size ({size})")
        if self.decoder_only and self.start_from is None:
            raise InputError("decoder_only is true, which needs start_from, the tokenizer whose encoder is kept")
        if self.decoder_only and self.corruption.mask_ratio[1] > 0:
            raise InputError(
                "decoder_only is true, which needs the latents of use; set corruption.mask_ratio to [0, 0]"
            )
        if self.decoder_only and (self.loss.alignment is not None or self.loss.anneal_steps > 0):
            raise InputError(
                "decoder_only is true, which leaves nothing for loss.alignment or loss.anneal_steps to change"
            )


def expand_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a run with `model: {preset: NAME, ...}` written out; fields beside it overrule it.

    >>> expand_preset({"model": {"preset": "softvq-s-64", "latent_dim": 16}})["model"]["latent_dim"]
    16

    Args:
        data: A run as YAML gives it, whole or not.

    Returns:
        What `from_dict(TokenizerRunConfig, ...)` takes.

    Raises:
        InputError: If there is no such preset.
    """
    model = data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return dict(data)
    fields = {name: value for name, value in model.items() if name != "preset"}
    if not isinstance(model["preset"], str):
        raise InputError(f"model.preset is {model['preset']!r}, expected a name such as 'softvq-s-64'")
    return {**data, "model": merged(to_dict(preset(model["preset"])), fields)}


def idle_settings(config: TokenizerRunConfig) -> list[str]:
    """Return a sentence for each setting of a recipe that is valid but without effect in it."""
    found, loss, kind = [], config.loss, innermost(config.model.quantizer).kind
    if loss.adversarial is not None and loss.adversarial.start >= config.train.steps:
        found.append(
            f"the discriminator starts at step {loss.adversarial.start}, but the run ends at {config.train.steps}"
        )
    if loss.anneal_from != 1 and (loss.anneal_steps == 0 or kind in {"vq", "kl", "none"}):
        reason = "anneal_steps is 0" if loss.anneal_steps == 0 else f"{kind} has no temperature to anneal"
        found.append(f"loss.anneal_from is {loss.anneal_from} but has no effect, {reason}")
    return found


def build_task(
    config: TokenizerRunConfig, device: torch.device, *, fresh: bool = True, say: Callable[[str], None] = lambda _: None
) -> TokenizerTask:
    """Return the task of a recipe, on the CPU: the same weights on every rank.

    Args:
        config: The recipe.
        device: Where it will be trained, which decides the teacher's precision.
        fresh: Start from pretrained weights where the recipe names some; False if a checkpoint will be loaded.
        say: Takes one sentence for each of them.

    Returns:
        The task.

    Raises:
        InputError: If weights that the recipe asks for cannot be had or do not fit.
    """
    manual_seed(config.seed, "init")
    tokenizer = ImageTokenizer(config.model)
    if fresh and config.start_from is not None:
        _start_from(tokenizer, config.start_from, FREE_FIELDS if config.decoder_only else (*FREE_FIELDS, "temperature"))
        say(f"{config.start_from}: starts from its weights")
    elif fresh:
        for sentence in tokenizer.load_backbones():
            say(sentence)
    if config.decoder_only:
        tokenizer.freeze_encoder()
    loss, size = config.loss, config.model.image_size
    dtype = compute_dtype(config.train.precision, device)
    return TokenizerTask(
        tokenizer,
        loss,
        seed=config.seed,
        corruption=config.corruption,
        perceptual=load_perceptual(loss.perceptual_weights) if loss.perceptual_weight > 0 else None,
        semantic=_named("loss.semantic", SemanticDistance, loss.semantic, dtype=dtype),
        teacher=_named("loss.alignment", _teacher, loss.alignment, config.model, device),
        adversary=_named("loss.adversarial", Adversary, loss.adversarial, image_size=size, dtype=dtype),
    )


def _named(field: str, build: Callable[..., T], config: Any, *arguments: Any, **options: Any) -> T | None:
    """Build what an optional group of fields describes; a mistake in it is told with the name of the group."""
    try:
        return None if config is None else build(config, *arguments, **options)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error


def _teacher(config: AlignmentConfig, model: TokenizerConfig, device: torch.device) -> FrozenBackbone:
    teacher = load_backbone(
        config.teacher,
        image_size=model.image_size,
        pretrained=config.pretrained,
        weights=config.weights,
        dtype=compute_dtype(config.precision, device),
    )
    check_alignment(config.mode, model.num_latent_tokens, teacher.patches)
    if config.distance_weight > 0:
        check_alignment("avg_1d", model.num_latent_tokens, teacher.patches)
    return teacher


def _start_from(tokenizer: ImageTokenizer, name: str, free: tuple[str, ...]) -> None:
    source = ImageTokenizer.from_pretrained(name)
    new, old = (flat(to_dict(model.config)) for model in (tokenizer, source))
    changed = [field for field in dict.fromkeys([*old, *new]) if old.get(field) != new.get(field)]
    if "quantizer.kind" in changed:  # each kind has fields of its own, which say no more
        changed = [field for field in changed if field == "quantizer.kind" or not field.startswith("quantizer.")]
    changed = [
        f"{field} was {old.get(field)!r}, is {new.get(field)!r}" for field in changed if not field.endswith(free)
    ]
    own, added = tokenizer.state_dict(), {}
    if source.config.head_channels is None:  # a new head adds nothing to the picture before it is trained
        changed = [sentence for sentence in changed if not sentence.startswith("head_channels")]
        added = {key: value for key, value in own.items() if key.startswith("decoder.head.")}
    if changed:
        raise InputError(f"start_from is {name!r}, a tokenizer of another architecture ({'; '.join(changed[:3])})")
    copy_named(own, {**added, **source.state_dict()}, "tokenizer")
