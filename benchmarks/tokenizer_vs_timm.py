"""Compare a tokenizer's forward with the same two stock timm ViTs at the same token counts, in one run.

    python benchmarks/tokenizer_vs_timm.py [--preset softvq-s-64] [--batch 4] [--rounds 20] [--device cpu]

The two are timed in turns, round by round, so that a slow moment of the machine falls on both; the table gives each
one's median and the median of the rounds' ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer

from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.presets import preset
from softvq.tokenizers.vit import ViTConfig


def stock_vit(config: ViTConfig, *, image_size: int, patch_size: int, num_latent_tokens: int) -> VisionTransformer:
    """Return a stock timm ViT whose register tokens stand for the latent tokens, so that both see as many tokens."""
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.num_heads}
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        reg_tokens=num_latent_tokens,
        init_values=1.0,
        num_classes=0,
        **sizes,
    ).eval()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="softvq-s-64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    config = preset(arguments.preset)
    num_tokens = 1 + (config.image_size // config.patch_size) ** 2 + config.num_latent_tokens
    tokenizer = ImageTokenizer(config).eval().to(device)
    shape = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_latent_tokens")}
    encoder, decoder = (stock_vit(vit, **shape).to(device) for vit in (config.encoder, config.decoder))
    images = torch.rand(arguments.batch, 3, config.image_size, config.image_size, device=device) * 2 - 1

    def ours() -> None:
        tokenizer.decode_raw(tokenizer.encode_raw(images))

    def stock() -> None:
        encoder.forward_features(images)
        decoder.forward_features(images)

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for _ in range(3):
            ours(), stock()
        rounds = [(seconds(ours, device), seconds(stock, device)) for _ in range(arguments.rounds)]
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    table = Table(
        "forward", "median ms", title=f"{arguments.preset}, batch {arguments.batch}, {num_tokens} tokens, {name}"
    )
    table.add_row("softvq encode + decode", f"{statistics.median(r[0] for r in rounds) * 1e3:.1f}")
    table.add_row("two stock timm ViTs", f"{statistics.median(r[1] for r in rounds) * 1e3:.1f}")
    table.add_row("ratio (median of rounds)", f"{statistics.median(a / b for a, b in rounds):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
