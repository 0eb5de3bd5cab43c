"""What the tokens of a photograph do: where each one paints, what it is made of, what becomes of it when changed."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.app.photographs import Photograph
from softvq.app.pictures import difference_picture, picture_address
from softvq.app.studio import Stopped, Studio, decibels, finite
from softvq.errors import InputError
from softvq.evaluation.attribution import owner_picture, token_attribution, token_colours, token_maps

__all__ = ["DIRECTIONS", "TokenDesk"]

DIRECTIONS = 4
MAP_PX = 64
OWNER_CELLS = 32  # a side, in which the page finds the token under a click
CODEWORDS = 8
MAX_DEVIATIONS = 10.0
KINDS = ("keep", "mean", "zero", "photograph", "swap")
KEPT = 8  # photographs whose maps are kept


class TokenDesk:
    """Looks at single tokens, with the bundled photographs as what is usual.

    Args:
        studio: Models and photographs.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._usual: tuple[Tensor, Tensor] | None = None
        self._maps: dict[str, dict[str, Any]] = {}

    def maps(self, key: str, stop: threading.Event) -> dict[str, Any]:
        """Return where each token of a photograph changes the picture.

        Args:
            key: Of the photograph.
            stop: Once it is set, the work ends.

        Returns:
            The photograph, the picture of which token owns which pixel, and of each token a map, its colour,
            and its share of the pixels.

        Raises:
            InputError: If there is no such photograph.
            Stopped: If it was.
        """
        photograph = self._studio.photographs[key]
        if key not in self._maps:
            found = self._attribute(photograph, stop)
            while len(self._maps) >= KEPT:
                self._maps.pop(next(iter(self._maps)))
            self._maps[key] = found
        return self._maps[key]

    @torch.inference_mode()
    def token(self, key: str, token: int) -> dict[str, Any]:
        """Return what a token is made of.

        Args:
            key: Of the photograph.
            token: Its place, from 0.

        Returns:
            The likeliest codewords and their weights, stage by stage, the posterior's entropy in bits, and where the
            token lies on the principal directions of the bundled photographs' tokens at this place, in deviations.

        Raises:
            InputError: If there is no such photograph or token.
        """
        photograph = self._studio.photographs[key]
        self._check_place(token)
        mean, directions = self._directions(token)
        moved = photograph.latents[0, token] - mean
        lengths = directions.square().sum(1).clamp(min=1e-12)
        return {"coordinates": (directions @ moved / lengths).tolist(), **self._posterior(photograph, token)}

    @torch.inference_mode()
    def edit(self, key: str, edits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the picture from tokens that were changed.

        Args:
            key: Of the photograph.
            edits: For each changed token `token`, its place; `kind`: keep, mean, zero, photograph (with `other`, the
                key of one, whose token takes the place) or swap (with `other`, a place); and `moves`, how far it
                goes along each principal direction after that, in deviations.

        Returns:
            The picture, how it differs from the unchanged reconstruction, and its PSNR to the photograph.

        Raises:
            InputError: If an edit is not like that.
        """
        photograph, tokenizer = self._studio.photographs[key], self._studio.tokenizer
        latents = photograph.latents.clone()
        for edit in edits:
            self._apply(latents[0], photograph.latents[0], edit)
        whole, picture = (finite(tokenizer.decode(each)) for each in (photograph.latents, latents))
        return {
            "picture": picture_address(picture),
            "difference": picture_address(difference_picture(picture, whole)),
            "psnr": decibels(picture, photograph.image[0]),
            "change": float((picture - whole).abs().mean()) / 2,
        }

    def _attribute(self, photograph: Photograph, stop: threading.Event) -> dict[str, Any]:
        tokenizer = self._studio.tokenizer

        def go_on() -> None:
            if stop.is_set():
                raise Stopped

        changes = token_attribution(tokenizer, photograph.latents, self._means(), 8, go_on)[0]
        owners = changes.max(0)
        counted = torch.bincount(owners.indices[owners.values > 0], minlength=len(changes))
        small = [each.resize((MAP_PX, MAP_PX), Image.Resampling.BILINEAR) for each in token_maps(changes)]
        step = max(1, changes.shape[1] // OWNER_CELLS)
        return {
            "original": picture_address(photograph.image[0]),
            "owners": picture_address(owner_picture(changes)),
            "maps": [picture_address(each) for each in small],
            "colours": (255 * token_colours(len(changes))).round().int().tolist(),
            "shares": (counted / owners.indices.numel()).tolist(),
            "owner": owners.indices[step // 2 :: step, step // 2 :: step].tolist(),
        }

    def _apply(self, latents: Tensor, before: Tensor, edit: Mapping[str, Any]) -> None:
        """Change `latents`, `[token, dim]`, in place; `before` are those of the photograph."""
        token, kind, other = edit.get("token"), edit.get("kind", "keep"), edit.get("other")
        self._check_place(token)
        if kind not in KINDS:
            raise InputError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
        if kind == "mean":
            latents[token] = self._means()[token]
        elif kind == "zero":
            latents[token] = 0
        elif kind == "photograph":
            latents[token] = self._studio.photographs[str(other)].latents[0, token]
        elif kind == "swap":
            self._check_place(other)
            latents[token], latents[other] = before[other], before[token]
        moves = edit.get("moves", [])
        if not isinstance(moves, list) or len(moves) > DIRECTIONS or not all(_is_move(move) for move in moves):
            raise InputError(f"moves is {moves!r}, expected at most {DIRECTIONS} numbers from -10 to 10")
        if any(moves):
            _, directions = self._directions(token)
            amounts = torch.tensor(moves, dtype=torch.float32, device=latents.device)[: len(directions)]
            latents[token] += amounts @ directions[: len(moves)]

    def _check_place(self, token: object) -> None:
        count = self._studio.tokenizer.config.num_latent_tokens
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
            raise InputError(f"token is {token!r}, expected a whole number from 0 to {count - 1}")

    def _means(self) -> Float[Tensor, "token dim"]:
        return self._statistics()[0]

    def _directions(self, token: Any) -> tuple[Float[Tensor, " dim"], Float[Tensor, "direction dim"]]:
        means, directions = self._statistics()
        return means[token], directions[token]

    def _statistics(self) -> tuple[Float[Tensor, "token dim"], Float[Tensor, "token direction dim"]]:
        """Return the mean of each token, and its main directions, each as long as the deviation along it."""
        if self._usual is None:
            latents = self._studio.photographs.latents()
            if len(latents) < 2:
                mean = latents.new_zeros(latents.shape[1:])
                self._usual = mean, mean[:, None][:, :0]
            else:
                mean = latents.mean(0)
                centred = (latents - mean).transpose(0, 1)
                _, sizes, vectors = torch.linalg.svd(centred, full_matrices=False)
                deviations = sizes[:, :DIRECTIONS, None] / (len(latents) - 1) ** 0.5
                vectors = vectors[:, :DIRECTIONS]
                largest = vectors.abs().argmax(-1, keepdim=True)  # a sign that is the same on every machine
                self._usual = mean, vectors * vectors.gather(-1, largest).sign() * deviations
        return self._usual

    def _posterior(self, photograph: Photograph, token: int) -> dict[str, Any]:
        quantizer: Any = self._studio.tokenizer.quantizer
        if not hasattr(quantizer, "top_codewords"):
            return {"codewords": [], "entropy": None, "codebook": 0}
        pre = self._studio.tokenizer.encode_pre(photograph.image)
        size = _codebook_size(quantizer)
        indices, weights = quantizer.top_codewords(pre, min(CODEWORDS, size))
        stages = zip(*(each[0, token].reshape(-1, each.shape[-1]).tolist() for each in (indices, weights)), strict=True)
        entropy = None
        if hasattr(quantizer, "posterior"):
            posterior = quantizer.posterior(pre)[0, token].double()
            entropy = float(torch.special.entr(posterior).sum() / torch.log(torch.tensor(2.0)))
        codewords = [
            [{"index": i, "weight": weight} for i, weight in zip(places, shares, strict=True)]
            for places, shares in stages
        ]
        return {"codewords": codewords, "entropy": entropy, "codebook": size}


def _codebook_size(quantizer: Any) -> int:
    return min(module.codebook_size for module in quantizer.modules() if hasattr(module, "codebook_size"))


def _is_move(move: object) -> bool:
    return isinstance(move, int | float) and not isinstance(move, bool) and abs(move) <= MAX_DEVIATIONS
