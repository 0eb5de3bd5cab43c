"""The photographs the app knows: those it comes with, and the last few that were dropped on it."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.data.images import center_crop, read_image, to_tensor
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["Bundled", "Photograph", "Photographs"]

MAX_DROPPED = 32
MAX_NAME = 80
SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundled:
    """A photograph that is offered on the page."""

    path: Path
    """The file."""
    name: str
    """What to call it."""
    credit: str = ""
    """Who took it and under which licence; empty where none is owed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """A photograph with its tokens."""

    key: str
    """What the page calls it by."""
    name: str
    """What people call it."""
    size: str
    """Its own size, and what of it was taken, for people."""
    credit: str
    """Who took it and under which licence; empty where none is owed."""
    image: Tensor
    """`[1, 3, size, size]` in [-1, 1], the middle square at the tokenizer's own size."""
    latents: Tensor
    """`[1, token, dim]`, normalised."""


class Photographs:
    """Photographs by their keys, encoded when they are first asked for.

    Args:
        tokenizer: Encodes them.
        bundled: Those to offer; twelve of them, spread evenly, are shown, and all of them tell what is usual.
    """

    def __init__(self, tokenizer: ImageTokenizer, bundled: Sequence[Bundled]) -> None:
        self._tokenizer = tokenizer
        self._bundled = {f"bundled-{i}": item for i, item in enumerate(bundled)}
        self._encoded: dict[str, Photograph] = {}
        self._dropped: OrderedDict[str, Photograph] = OrderedDict()

    def shown(self) -> list[Photograph]:
        """Return the bundled photographs that the page offers."""
        keys = list(self._bundled)
        count = min(SHOWN, len(keys))
        return [self[keys[i * len(keys) // count]] for i in range(count)]

    def latents(self) -> Float[Tensor, "photo token dim"]:
        """Return the latents of all bundled photographs, from which means and directions are taken."""
        config = self._tokenizer.config
        found = [self[key].latents for key in self._bundled]
        return torch.cat(found) if found else torch.zeros(0, config.num_latent_tokens, config.latent_dim)

    def add(self, data: bytes, name: str) -> Photograph:
        """Take in what was dropped on the page; the oldest but 31 is forgotten.

        Args:
            data: Bytes of a JPEG, PNG or WebP.
            name: Of the file, for people.

        Returns:
            The photograph with its tokens.

        Raises:
            InputError: If it is no such picture, or too large a one.
        """
        name = "".join(char for char in name if char.isprintable())[:MAX_NAME] or "photograph"
        key = f"dropped-{hashlib.sha256(data).hexdigest()[:24]}"
        if key not in self._dropped:
            self._dropped[key] = self._encode(key, name, "", read_image(data, name=name))
        self._dropped.move_to_end(key)
        while len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)
        return self._dropped[key]

    def __getitem__(self, key: str) -> Photograph:
        if key in self._bundled and key not in self._encoded:
            item = self._bundled[key]
            self._encoded[key] = self._encode(key, item.name, item.credit, read_image(item.path))
        if key not in self._encoded and key not in self._dropped:
            raise InputError("this photograph is no longer kept here; drop it on the page again, or choose another")
        return self._encoded[key] if key in self._encoded else self._dropped[key]

    @torch.inference_mode()
    def _encode(self, key: str, name: str, credit: str, image: Image.Image) -> Photograph:
        square = to_tensor(center_crop(image, self._tokenizer.config.image_size))[None]
        images = square.to(self._tokenizer.latent_mean.device)
        taken = "" if image.width == image.height else ", its middle square"
        size = f"{image.width} × {image.height} pixels{taken}"
        latents = self._tokenizer.encode(images)
        return Photograph(key=key, name=name, size=size, credit=credit, image=images, latents=latents)
