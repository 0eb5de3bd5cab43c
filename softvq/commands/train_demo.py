"""Two minutes from nothing to a page of photographs: `softvq demo --train`."""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import softvq
from softvq.commands import demo_photos
from softvq.commands.common import Photos, check_output, machine_name, messages, results, round_trip
from softvq.commands.demo_photos import credits_of_photos, photos_of
from softvq.commands.train import read_recipe
from softvq.errors import Interrupted
from softvq.evaluation.page import Reconstruction, measure, reconstruction_page
from softvq.evaluation.pictures import side_by_side
from softvq.files import replacing, write_text
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device
from softvq.training.tokenizer_run import train_tokenizer

__all__ = ["train_demo"]


def train_demo(arguments: argparse.Namespace) -> None:
    """Train a tiny tokenizer on bundled photographs, reconstruct others, write a picture and a page."""
    out = Path(arguments.out)
    started = time.perf_counter()
    check_output(out, overwrite=True)  # another demo may be replaced
    console = messages()
    device = choose_device(arguments.device)
    changes = {"data.path": str(photos_of("train")), "train.device": str(device), "seed": arguments.seed}
    recipe = read_recipe(demo_photos.ASSETS / "demo.yaml", [], changes)
    steps = arguments.steps or recipe.train.steps
    train = dataclasses.replace(recipe.train, steps=steps, save_every=steps, keep=1)
    console.print(f"training {steps} steps of {train.batch_size} photographs", soft_wrap=True)
    try:
        with tempfile.TemporaryDirectory(prefix="softvq-demo-") as folder:
            run = train_tokenizer(dataclasses.replace(recipe, train=train), Path(folder, "run"), console=console)
            tokenizer = ImageTokenizer.from_pretrained(run)
    except Interrupted as error:  # what was saved is gone with the temporary folder
        raise KeyboardInterrupt from error
    tokenizer.save_pretrained(out / "tokenizer")
    items = _reconstruct(tokenizer, console)
    facts = {
        "Model": f"{tokenizer.config.quantizer.kind}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters",
        "Training": f"{steps} steps of {train.batch_size} photographs, {time.perf_counter() - started:.0f} s",
        "Machine": machine_name(device),
        "Command": f"softvq demo --steps {steps} --seed {arguments.seed} --device {arguments.device}",
        "Versions": f"softvq {softvq.__version__}, torch {torch.__version__}",
    }
    _write(items, facts, out)


@torch.inference_mode()
def _reconstruct(tokenizer: ImageTokenizer, console: Console) -> list[Reconstruction]:
    config = tokenizer.config
    size = config.image_size, config.image_size
    photos = list(Photos(source=photos_of("val"), size=size, patch_size=config.patch_size, console=console))
    images = torch.stack([photo.image for photo in photos])
    copies = round_trip(tokenizer, images, "float32")
    names = [photo.name for photo in photos]
    credits = credits_of_photos()
    lines = [credits.get(f"val/{name}", "") for name in names]
    return measure(images, copies, names, config.num_latent_tokens, config.latent_dim, lines)


def _write(items: Sequence[Reconstruction], facts: dict[str, str], out: Path) -> None:
    captions = [f"{Path(item.name).stem} · {item.psnr:.1f} dB" for item in items]
    picture = side_by_side([item.original for item in items], [item.reconstruction for item in items], captions)
    with replacing(out / "demo.png") as temporary:
        picture.save(temporary)
    write_text(out / "demo.html", reconstruction_page("What softvq learned", items, facts))
    mean = statistics.fmean(item.psnr for item in items)
    baseline = statistics.fmean(item.mean_colour_psnr for item in items)
    console = results()
    console.print(f"{len(items)} held-out photographs, {items[0].num_latent_tokens} tokens each; {facts['Machine']}:")
    console.print(f"  mean PSNR               {mean:6.2f} dB")
    console.print(f"  of their mean colours   {baseline:6.2f} dB")
    console.print(f"  gain                    {mean - baseline:+6.2f} dB")
    console.print(f"  smallest gain           {min(item.psnr - item.mean_colour_psnr for item in items):+6.2f} dB")
    for name in ("demo.html", "demo.png", "tokenizer"):
        console.print(str((out / name).resolve()), soft_wrap=True)
