"""Parts of models as files that run elsewhere: `softvq export`."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Literal

from softvq.commands.common import check_output, messages, results
from softvq.errors import InputError
from softvq.export.files import write_part
from softvq.export.parts import Part, decoder_part, encoder_part, sampler_part
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["export"]

SUFFIXES: dict[str, Literal["torch", "onnx"]] = {".pt2": "torch", ".onnx": "onnx"}
OPTIONS = {"decoder": ("tokens",), "sampler": ("steps", "sampler", "guidance", "latents", "tokenizer")}
STEPS = 10


def export(arguments: argparse.Namespace) -> None:
    """Write an encoder, a decoder or a sampler, and tell how far its outputs are from the model's."""
    out = Path(arguments.out)
    file_format = SUFFIXES.get(out.suffix)
    if file_format is None or arguments.format not in (None, file_format) or out.is_dir():
        wanted = {"torch": ".pt2", "onnx": ".onnx"}.get(arguments.format, ".pt2 or .onnx")
        raise InputError(f"{out}: is to be an exported model, give a name that ends in {wanted}")
    for each in (out, out.with_name(f"{out.name}.json")):
        check_output(each, arguments.overwrite)
    part = _part(arguments)
    with messages().status(f"{part.kind}: tracing, writing, comparing"):
        check = write_part(part, out, file_format, arguments.precision)
    size = out.stat().st_size / 2**20
    results().print(
        f"{out}: {part.kind}, {arguments.precision}, {size:,.1f} MiB; largest difference {check.largest:.1e} of the "
        f"largest output, {_told(check.root_mean_square)}",
        soft_wrap=True,
    )


def _part(arguments: argparse.Namespace) -> Part:
    for part, names in OPTIONS.items():
        given = [name for name in names if getattr(arguments, name) not in (None, False)]
        if given and arguments.part != part:
            raise InputError(f"--{given[0]} is for --part {part}, not for {arguments.part}; leave it out")
    if arguments.part != "sampler":
        tokenizer = ImageTokenizer.from_pretrained(arguments.model)
        return encoder_part(tokenizer) if arguments.part == "encoder" else decoder_part(tokenizer, arguments.tokens)
    pipeline = GenerationPipeline.from_pretrained(arguments.model, tokenizer=arguments.tokenizer)
    recipe = dataclasses.replace(pipeline.generator.sampling, steps=arguments.steps or STEPS)
    if arguments.sampler is not None:
        recipe = dataclasses.replace(recipe, sampler=arguments.sampler)
    if arguments.guidance is not None:
        recipe = dataclasses.replace(recipe, guidance=dataclasses.replace(recipe.guidance, scale=arguments.guidance))
    return sampler_part(pipeline, recipe, pixels=not arguments.latents)


def _told(ratio: float) -> str:
    return "all numbers the same" if ratio == 0 else f"{-20 * math.log10(ratio):.1f} dB below the outputs on the whole"
