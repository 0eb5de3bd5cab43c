"""The statistics that normalise latents, fitted on photographs: `softvq fit-stats`."""

import argparse
from pathlib import Path

import torch

from softvq.commands.common import (
    batched,
    check_output,
    load_tokenizer,
    messages,
    open_photos,
    precision_of,
    results,
)
from softvq.config import read_json
from softvq.errors import InputError
from softvq.training.distributed import choose_device

__all__ = ["fit_stats"]

FEW = 100


@torch.inference_mode()
def fit_stats(arguments: argparse.Namespace) -> None:
    """Fit `latent_mean` and `latent_std` on photographs and save the model with them."""
    out = Path(arguments.out or arguments.model)
    if arguments.out is None:
        _check_own(out)
    else:
        check_output(out, arguments.overwrite)
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    before = tokenizer.latent_fingerprint()
    photos = open_photos(arguments, tokenizer)
    with precision_of(device, arguments.precision):
        batches = (images for _, images in batched(photos, arguments.batch_size))
        tokenizer.fit_statistics(batches, per_channel=arguments.per_channel)
    tokenizer.save_pretrained(out)
    console = results()
    count = len(photos.paths) - len(photos.skipped)
    console.print(f"{out}: fitted on {count} photograph{'s' * (count > 1)}", soft_wrap=True)
    if count < FEW:
        messages().print(f"{count} is few, give some hundred for statistics that hold for others", soft_wrap=True)
    for name, values in (("mean", tokenizer.latent_mean), ("std", tokenizer.latent_std)):
        low, high = values.min().item(), values.max().item()
        console.print(f"latent_{name}: {low:.4g}" + (f" to {high:.4g}" if arguments.per_channel else ""))
    if tokenizer.latent_fingerprint() != before:
        messages().print("latent files made before belong to the model as it was; encode them again", soft_wrap=True)


def _check_own(folder: Path) -> None:
    """Refuse to write over what softvq did not write: a name on the hub, or a folder of the released code."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder here that statistics could be saved in; give --out DIR")
    if read_json(folder / "config.json").get("format") != "softvq-tokenizer":
        raise InputError(f"{folder}: was not written by softvq, so it is left as it is; give --out DIR")
