"""Arguments of softvq compress and softvq decompress."""

from softvq.arguments.shared import Commands, add_command, add_model, natural, positive

__all__ = ["add_codec"]


def add_codec(commands: Commands) -> None:
    """Add compress and decompress."""
    compress = add_command(
        commands, "compress", "codec:compress", "turn a photograph into a file of a few hundred bytes, with loss"
    )
    add_model(compress)
    compress.add_argument("photo", metavar="PHOTO", help="a photograph (JPEG, PNG, WebP)")
    compress.add_argument("out", metavar="OUT", help="the file to write, NAME.svq")
    compress.add_argument(
        "--tokens", type=positive, metavar="N", help="of a nested tokenizer, the first so many (default: all)"
    )
    compress.add_argument(
        "--coder",
        choices=("latents", "codewords"),
        default="latents",
        help="what is written: latents in steps, or the likeliest codewords of each token (default: latents)",
    )
    compress.add_argument(
        "--bits",
        type=natural,
        metavar="B",
        help="steps of latents are 8 / 2^B deviations; of codewords, what a weight takes (default: 4; for --top 1, 0)",
    )
    compress.add_argument("--top", type=positive, default=1, metavar="K", help="codewords of each token (default: 1)")
    compress.add_argument(
        "--fit",
        choices=("stretch", "shape", "crop"),
        default="stretch",
        help="of pictures that are no square: all of it as a square, in about its own shape, or its middle square "
        "(default: stretch)",
    )
    decompress = add_command(
        commands, "decompress", "codec:decompress", "turn what softvq compress wrote back into a picture"
    )
    add_model(decompress)
    decompress.add_argument("file", metavar="FILE", help="a file that softvq compress wrote with the same MODEL")
    decompress.add_argument("out", metavar="OUT", help="the picture to write (PNG, JPEG, WebP)")
    for command in (compress, decompress):
        command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
        command.add_argument("--overwrite", action="store_true", help="write although something is there already")
