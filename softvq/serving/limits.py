"""What a server takes on: sizes, times, and how much may wait."""

import dataclasses

from softvq.data.images import PILLOW_MAX_PIXELS
from softvq.errors import InputError

__all__ = ["Limits"]

RANGES = {
    "batch": (1, 4096),
    "wait": (0, 10),
    "queue": (1, 100_000),
    "body_bytes": (1 << 10, 1 << 30),
    "pixels": (1, PILLOW_MAX_PIXELS),
    "images": (1, 4096),
    "steps": (1, 10_000),
    "guidance": (0, 1000),
    "previews": (1, 1000),
    "deadline": (0.01, 3600),
    "upload": (0.01, 3600),
    "grace": (0, 3600),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Every limit of a server; requests beyond one are refused with a sentence that names it."""

    batch: int = 16
    """Images computed at once."""
    wait: float = 0.005
    """Seconds that a request waits for others to be computed with it."""
    queue: int = 64
    """Requests taken on at a time, from the first byte of the body to the last of the answer; further ones get 503."""
    body_bytes: int = 8 << 20
    """Bytes of a body; above 413."""
    pixels: int = 16_000_000
    """Width times height of an image, from its header, before it is decoded; above 422."""
    images: int = 8
    """Images generated for one request; above 422."""
    steps: int = 100
    """Steps of a sampler; above 422."""
    guidance: float = 20.0
    """Scale of guidance; above 422."""
    previews: int = 16
    """Previews of one stream; above 422."""
    deadline: float = 60.0
    """Seconds from the end of the body to the answer; after that 504, and nobody works on it any more."""
    upload: float = 20.0
    """Seconds for a body to arrive; after that 408."""
    grace: float = 30.0
    """Seconds in which a server that was told to stop finishes what it has taken on."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} is {value}, expected {low} to {high}")
        if self.images > self.batch:
            raise InputError(
                f"images is {self.images}, expected at most batch ({self.batch}), which is computed at once"
            )
