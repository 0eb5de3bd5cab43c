"""Quantizers made of quantizers: one for each part of the channels, and one for what the last one left."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, cast

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.randomness import fold_in
from softvq.tokenizers.baselines import VQConfig
from softvq.tokenizers.codebooks import CodebookQuantizer, codebook_statistics, keys_or_fresh, unit
from softvq.tokenizers.gmmvq import GMMVQConfig
from softvq.tokenizers.gumbel import GumbelConfig
from softvq.tokenizers.softvq import SoftVQConfig

__all__ = ["Product", "ProductConfig", "Residual", "ResidualConfig", "check_parts"]

MAX_STAGES = 64
MAX_NESTING = 4
MAX_TOTAL = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProductConfig:
    """A quantizer of its own for each part of the channels."""

    kind: Literal["product"] = "product"
    parts: int = 2
    """Equal pieces of the channels; divides their number."""
    inner: "SoftVQConfig | VQConfig | GMMVQConfig | GumbelConfig | ProductConfig | ResidualConfig" = dataclasses.field(
        default_factory=SoftVQConfig
    )
    """The quantizer of every piece; each has weights of its own."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_stages("parts", self.parts, self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResidualConfig:
    """Quantizers in a row, each for what those before it left."""

    kind: Literal["residual"] = "residual"
    depth: int = 2
    """Quantizers in the row."""
    inner: "SoftVQConfig | VQConfig | GMMVQConfig | GumbelConfig | ProductConfig | ResidualConfig" = dataclasses.field(
        default_factory=SoftVQConfig
    )
    """The quantizer at every depth; each has weights of its own."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_stages("depth", self.depth, self)


class _Stages(nn.Module):
    """What product and residual share: all that is said of codewords is said stage by stage, on an axis after token."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def indices(self, latents_pre: Float[Tensor, "batch token dim"]) -> Int[Tensor, "batch token *stage"]:
        """Return the likeliest codewords of every token: this quantizer's stages first, then those within them."""
        with torch.no_grad():
            return torch.stack([stage.indices(x) for stage, x in self._staged(latents_pre)], dim=2)

    def top_codewords(
        self, latents_pre: Float[Tensor, "batch token dim"], k: int
    ) -> tuple[Int[Tensor, "batch token *stage"], Float[Tensor, "batch token *stage"]]:
        """Return the likeliest codewords of every token and stage, and their probabilities.

        Args:
            latents_pre: The encoder's outputs.
            k: How many, 1 to the codebook's size.

        Returns:
            Indices and posterior probabilities, axes as in `indices` and then k, the likeliest first.

        Raises:
            InputError: If there are not so many codewords.
        """
        with torch.no_grad():
            pairs = [stage.top_codewords(x, k) for stage, x in self._staged(latents_pre)]
        indices, weights = zip(*pairs, strict=True)
        return torch.stack(indices, dim=2), torch.stack(weights, dim=2)

    def averages(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return the averages of all stages, their codebooks one after the other on the first axis."""
        with torch.no_grad():
            stages = [stage.averages(x) for stage, x in self._staged(latents_pre)]
        return {name: torch.cat([averages[name] for averages in stages]) for name in stages[0]}

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return usage, perplexity, posterior entropy and largest probability over all codebooks."""
        return codebook_statistics(self.averages(latents_pre))

    def _quantizers(self) -> "list[CodebookQuantizer | Product | Residual]":
        return cast("list[CodebookQuantizer | Product | Residual]", list(self.stages))

    def _staged(self, latents_pre: Tensor) -> "list[tuple[CodebookQuantizer | Product | Residual, Tensor]]":
        """Return every stage with what it sees in use."""
        raise NotImplementedError


class Product(_Stages):
    """Product quantization (Jegou et al. 2011): the channels are cut into equal parts, each quantized by itself.

    The latent is the parts one after the other. Where parts are unit vectors, its norm is the root of their number. The
    loss terms are means over parts. K codewords in each of P parts tell K^P latents apart.

    Args:
        stages: The parts' quantizers, in the order of the channels, all alike.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__(stages)
        self.input_dim = sum(stage.input_dim for stage in self._quantizers())

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the parts' latents side by side, and the means of their loss terms.

        Args:
            latents_pre: The encoder's outputs.
            keys: Of the samples' noise, other noise for each part; None draws new ones.
            softening: Multiplies the parts' temperatures.

        Returns:
            Latents, and the loss terms by name.
        """
        keys = keys_or_fresh(keys, latents_pre)
        latents, losses = [], []
        for i, (stage, part) in enumerate(self._staged(latents_pre)):
            quantized, terms = stage(part, fold_in(keys, i), softening)
            latents.append(quantized)
            losses.append(terms)
        return torch.cat(latents, dim=-1), _means(losses)

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the parts' latents to use, side by side."""
        return torch.cat([stage.encode(part) for stage, part in self._staged(latents_pre)], dim=-1)

    def lookup(self, indices: Int[Tensor, "batch token *stage"]) -> Float[Tensor, "batch token dim"]:
        """Return the codewords that `indices` name, side by side."""
        return torch.cat([stage.lookup(indices[:, :, i]) for i, stage in enumerate(self._quantizers())], dim=-1)

    def _staged(self, latents_pre: Tensor) -> "list[tuple[CodebookQuantizer | Product | Residual, Tensor]]":
        return list(zip(self._quantizers(), latents_pre.chunk(len(self.stages), dim=-1), strict=True))


class Residual(_Stages):
    """Residual quantization: each quantizer takes what those before it left over (Juang and Gray 1982).

        r_0 = z / |z|;    z_i = s_i Q_i(r_i);    r_{i+1} = r_i - z_i;    latent = sum_i z_i

    Quantizers by cosine return vectors of the unit ball however small r_i is, hence the learned scales s_i, which start
    at 2^-i, and hence the unit vector to begin with: one set of scales must fit all tokens, and the first quantizer
    does not see the length anyhow. No gradient is stopped between the stages: the encoder sees how a change of one
    stage's output changes what the next one has to do. The loss terms are means over stages.

    Note:
        The paper (arXiv:2412.10958) states that residual quantization combines with SoftVQ, and gives no equation for
        it; the scales and the unit vector are ours.

    Args:
        stages: The quantizers, in their order, all alike.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__(stages)
        self.input_dim = self._quantizers()[0].input_dim
        self.scales = nn.Parameter(0.5 ** torch.arange(len(self.stages)))

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the sum of the stages' latents, and the means of their loss terms.

        Args:
            latents_pre: The encoder's outputs.
            keys: Of the samples' noise, other noise for each stage; None draws new ones.
            softening: Multiplies the stages' temperatures.

        Returns:
            Latents, and the loss terms by name.
        """
        keys = keys_or_fresh(keys, latents_pre)
        rest, latents, losses = unit(latents_pre), torch.zeros_like(latents_pre, dtype=torch.float32), []
        for i, (scale, stage) in enumerate(self._scaled()):
            quantized, terms = stage(rest, fold_in(keys, i), softening)
            quantized = scale * quantized
            rest, latents = rest - quantized, latents + quantized
            losses.append(terms)
        return latents, _means(losses)

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the sum of the stages' latents to use."""
        rest = unit(latents_pre)
        latents = torch.zeros_like(rest)
        for scale, stage in self._scaled():
            quantized = scale * stage.encode(rest)
            rest, latents = rest - quantized, latents + quantized
        return latents

    def lookup(self, indices: Int[Tensor, "batch token *stage"]) -> Float[Tensor, "batch token dim"]:
        """Return the scaled sum of the codewords that `indices` name."""
        found = [scale * stage.lookup(indices[:, :, i]) for i, (scale, stage) in enumerate(self._scaled())]
        return torch.stack(found).sum(dim=0)

    def _staged(self, latents_pre: Tensor) -> "list[tuple[CodebookQuantizer | Product | Residual, Tensor]]":
        rest, staged = unit(latents_pre), []
        for scale, stage in self._scaled():
            staged.append((stage, rest))
            rest = rest - scale * stage.encode(rest)
        return staged

    def _scaled(self) -> "list[tuple[Tensor, CodebookQuantizer | Product | Residual]]":
        return list(zip(self.scales.float(), self._quantizers(), strict=True))


def check_parts(latent_dim: int, parts: int) -> None:
    """Refuse parts that do not divide the channels, which inside another product are those of one of its parts."""
    if latent_dim % parts:
        raise InputError(f"parts is {parts}, expected a divisor of latent_dim ({latent_dim})")


def _means(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([terms[name] for terms in losses]).mean() for name in losses[0]}


def _check_stages(name: str, stages: int, config: ProductConfig | ResidualConfig) -> None:
    if not 1 <= stages <= MAX_STAGES:
        raise InputError(f"{name} is {stages}, expected 1 to {MAX_STAGES}")
    nesting, total, inner = 1, stages, config.inner
    while isinstance(inner, ProductConfig | ResidualConfig):
        nesting, total = nesting + 1, total * (inner.parts if isinstance(inner, ProductConfig) else inner.depth)
        inner = inner.inner
    if nesting > MAX_NESTING:
        raise InputError(f"{nesting} product and residual quantizers are nested, expected at most {MAX_NESTING}")
    if total > MAX_TOTAL:
        raise InputError(f"{name} is {stages}, which makes {total} quantizers, expected at most {MAX_TOTAL}")
