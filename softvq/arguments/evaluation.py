"""Arguments of `softvq evaluate`."""

import argparse

from softvq.arguments.sampling import SAMPLERS
from softvq.arguments.shared import Commands, add_command, add_machine, add_model, natural, positive

__all__ = ["PROTOCOLS", "RECONSTRUCTION_PROTOCOLS", "add_evaluate"]

PROTOCOLS = ("folder", "adm-256-train50k", "val50k-center256")
RECONSTRUCTION_PROTOCOLS = ("folder", "val50k-center256")


def add_evaluate(commands: Commands) -> None:
    """Add evaluate reconstruction, generation, probe, latents and compare."""
    evaluate = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="figures", metavar="WHAT", required=True, dest="kind")
    _add_reconstruction(kinds)
    _add_generation(kinds)
    _add_probe(kinds)
    _add_latents(kinds)
    _add_compare(kinds)


def _add_reconstruction(kinds: Commands) -> None:
    command = add_command(
        kinds,
        "reconstruction",
        "evaluate_reconstruction:reconstruction",
        "see what comes back of photographs: rFID, PSNR, SSIM, LPIPS, the worst ones",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a tokenizer: a folder, or a name on the Hugging Face hub; - with --reconstructions",
    )
    command.add_argument("data", metavar="DATA", help="photographs: a folder, tar shards, hf:NAME, or .npz file")
    command.add_argument("--size", type=positive, metavar="N", help="centre-crop to N x N (default: the model's)")
    command.add_argument("--images", type=positive, metavar="N", help="at most so many, spread evenly (default: all)")
    command.add_argument("--tokens", type=positive, metavar="N", help="decode the first N alone (default: all)")
    command.add_argument(
        "--reconstructions", metavar="SET", help="judge these, a folder or .npz file made of DATA, instead of a model's"
    )
    command.add_argument(
        "--perceptual",
        default="auto",
        metavar="NAME",
        help="auto, none, st-lpips[=FILE], lpips-vgg or lpips-alex (default: auto, st-lpips where it is installed)",
    )
    command.add_argument("--worst", type=positive, default=16, metavar="N", help="show so many (default: 16)")
    _add_sets(command, "reconstruction-report", RECONSTRUCTION_PROTOCOLS)


def _add_generation(kinds: Commands) -> None:
    command = add_command(
        kinds,
        "generation",
        "evaluate_generation:generation",
        "compare generated images with photographs: FID, IS, precision, recall and more",
    )
    command.add_argument(
        "samples", metavar="SAMPLES|MODEL", help="a folder, .npz or latents file of images, or a generator to make them"
    )
    command.add_argument(
        "reference",
        metavar="REFERENCE",
        help="photographs: a folder, tar shards, hf:NAME, an .npz file of images, or ADM's statistics",
    )
    command.add_argument("--n", type=positive, metavar="N", help="images of a MODEL (default: 5000)")
    command.add_argument("--seed", type=int, help="of a MODEL's images (default: 0)")
    command.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="X",
        help="guidance scales of a MODEL, each a row (default: its own)",
    )
    command.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="steps of a MODEL's sampler, each a row (default: its own)"
    )
    command.add_argument(
        "--sampler", choices=SAMPLERS, nargs="+", help="samplers of a MODEL, each a row (default: its own)"
    )
    command.add_argument("--tokenizer", metavar="MODEL", help="of SAMPLES that are latents, or of a MODEL")
    command.add_argument("--compile", action="store_true", help="compile a MODEL's networks: a slow start, then faster")
    command.add_argument(
        "--validation", metavar="SET", help="photographs whose own figures stand beside, the 1.0 of the scale"
    )
    command.add_argument(
        "--keep-features", metavar="DIR", help="keep there what is seen in REFERENCE, and look no more where it is kept"
    )
    command.add_argument("--size", type=positive, metavar="N", help="side of the images (default: that of SAMPLES)")
    command.add_argument("--crop", action="store_true", help="centre-crop photographs to that size, as ADM does")
    _add_sets(command, "generation-report", PROTOCOLS)


def _add_sets(command: argparse.ArgumentParser, out: str, protocols: tuple[str, ...]) -> None:
    command.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="folder",
        metavar="NAME",
        help=f"what is compared with what: {', '.join(protocols)} (default: folder)",
    )
    command.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="KIND[=WEIGHTS]",
        help="networks to look through: inception=FILE, dinov2, clip, lite0, lite1, lite2, timm:NAME",
    )
    command.add_argument("--out", default=out, metavar="DIR", help=f"the folder to write to (default: {out})")
    command.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
    _add_workers(command)
    add_machine(command, batch_size=64, fp8=True)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=natural, default=0, metavar="N", help="that decode ahead (default: 0)")


def _add_probe(kinds: Commands) -> None:
    command = add_command(kinds, "probe", "evaluate:probe", "see how well classes can be told from latents or features")
    command.add_argument(
        "model", nargs="+", metavar="MODEL", help="model folders, or names on the Hugging Face hub; a row for each"
    )
    _add_measured(command, "folders train and val of photographs, each with a subfolder for every class")
    command.add_argument("--val", metavar="DIR", help="what to judge by; DATA is then what to learn from")
    command.add_argument(
        "--on",
        default="latents-pooled",
        metavar="FEATURES",
        help="latents-pooled, latents, encoder, or generator:LAYER (default: latents-pooled)",
    )
    command.add_argument("--generator", metavar="DIR", help="a generator on this tokenizer's latents")
    command.add_argument("--time", type=float, default=0.2, help="noise a generator sees, 0 to 1 (default: 0.2)")
    command.add_argument("--knn", type=positive, default=20, metavar="K", help="neighbours that vote (default: 20)")
    command.add_argument("--out", metavar="DIR", help="write probe.json and probe.html into this folder")


def _add_latents(kinds: Commands) -> None:
    command = add_command(kinds, "latents", "evaluate:latents", "report what latents look like: a page and report.json")
    add_model(command)
    _add_measured(command, "a folder of photographs; its subfolders are the classes")
    command.add_argument(
        "--features", nargs="+", metavar="NAME", help="a vision encoder to compare with: a timm model, its weights"
    )
    command.add_argument(
        "--out", default="latent-report", metavar="DIR", help="the folder to write to (default: latent-report)"
    )


def _add_measured(command: argparse.ArgumentParser, data: str) -> None:
    command.add_argument("data", metavar="DATA", help=data)
    command.add_argument(
        "--images", type=positive, default=2048, metavar="N", help="at most so many, spread evenly (default: 2048)"
    )
    command.add_argument("--size", type=positive, metavar="N", help="centre-crop to N x N (default: the model's)")
    command.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
    _add_workers(command)
    add_machine(command)


def _add_compare(kinds: Commands) -> None:
    command = add_command(
        kinds, "compare", "compare:compare", "put results of one protocol and one reference side by side"
    )
    command.add_argument(
        "results", nargs="+", metavar="RESULT", help="reconstruction.json or generation.json files, or their folders"
    )
    command.add_argument("--out", metavar="DIR", help="write compare.json and compare.md into this folder")
    command.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
