"""A tiny MAR, the simplest process there is, and z by plain loops, shared by several tests."""

import torch
from torch import Tensor, nn

from softvq.generators.conditioning import Condition
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow, FlowConfig
from softvq.generators.mar import (
    MAR,
    MARConfig,
)
from softvq.generators.process import Prediction
from softvq.randomness import fold_in, keys_of, normal

TOKENS, DIM, CLASSES = 10, 3, 4
TINY = MARConfig(
    width=16, encoder_depth=2, decoder_depth=2, num_heads=2, head_width=12, head_depth=2, condition_tokens=3,
    min_mask_ratio=0.5,
)  # fmt: skip


class Clean:
    """The linear path, and a network that gives the clean latents; the simplest process there is."""

    def output_dim(self, dim: int) -> int:
        return dim

    def draw_times(self, keys: Tensor) -> Tensor:
        return torch.sigmoid(normal(keys))

    def noisy(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        time = time.reshape(-1, *[1] * (clean.ndim - 1))
        return (1 - time) * clean + time * noise

    def losses(self, output: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        return {"clean": (output.float() - clean).square().mean(-1)}

    def network_time(self, time: Tensor) -> Tensor:
        return 10 * time

    def predict(self, output: Tensor, noisy: Tensor, time: float) -> Prediction:
        return Prediction(output.float(), (noisy - (1 - time) * output.float()) / time)

    def levels(self, time: float) -> tuple[float, float]:
        return 1 - time, time

    def fraction(self, time: float) -> float:
        return time

    def time_at(self, fraction: float) -> float:
        return fraction

    def grid(self, steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
        return tuple(1 - i / steps for i in range(steps + 1))


def model_of(process=None, config: MARConfig = TINY, kind: str = "class", tokens: int = TOKENS) -> MAR:
    torch.manual_seed(0)
    model = MAR(config, tokens, DIM, Condition(kind, CLASSES, 5, config.width), process or Clean())
    for parameter in model.parameters():  # much starts at zero
        nn.init.normal_(parameter, std=0.3)
    for table in (model.encoder_positions, model.condition.table.weight if kind == "class" else model.mask_token):
        nn.init.normal_(table)
    return model


def batch_of(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys = keys_of(0, "test", torch.arange(size))
    clean = normal(fold_in(keys, 77), TOKENS, DIM)
    return clean, torch.arange(size) % CLASSES, torch.arange(size) % 3 == 2, keys


PROCESSES = {
    "clean": Clean,
    "flow": lambda: Flow(FlowConfig()),
    "diffusion": lambda: Diffusion(DiffusionConfig(schedule="cosine")),
}


def plain_z(model: MAR, clean: Tensor, visible: list[int], vector: Tensor) -> Tensor:
    """Return z of every place of one image, in raster order and without masks of attention."""
    prefix = model.config.condition_tokens
    tokens = [vector + model.encoder_positions[i] for i in range(prefix)]
    tokens += [model.to_tokens(clean[j]) + model.encoder_positions[prefix + j] for j in visible]
    hidden = model.start_norm(torch.stack(tokens))[None]
    for block in model.encoder_blocks:
        hidden = block(hidden)
    encoded = model.to_decoder(model.encoder_norm(hidden))[0]
    places = [model.mask_token] * TOKENS
    for i, j in enumerate(visible):
        places[j] = encoded[prefix + i]
    hidden = (torch.cat([encoded[:prefix], torch.stack(places)]) + model.decoder_positions)[None]
    for block in model.decoder_blocks:
        hidden = block(hidden)
    return model.decoder_norm(hidden)[0, prefix:] + model.head_positions
