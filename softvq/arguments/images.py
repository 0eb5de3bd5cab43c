"""Arguments of commands on photographs and tokenizers."""

from softvq.arguments.shared import Commands, add_command, add_machine, add_model, add_photos

__all__ = ["add_images", "add_tokenizers"]


def add_images(commands: Commands) -> None:
    """Add encode, decode and reconstruct."""
    encode = add_command(
        commands, "encode", "images:encode", "turn a photograph or a folder of them into a latent file"
    )
    add_model(encode)
    add_photos(encode)
    encode.add_argument("out", metavar="OUT", help="the latent file to write, NAME.safetensors")
    encode.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="how latents are stored (default: float16)"
    )
    decode = add_command(commands, "decode", "images:decode", "turn a latent file back into PNG files")
    add_model(decode)
    decode.add_argument("latents", metavar="LATENTS", help="a file written by softvq encode with the same MODEL")
    decode.add_argument("out", metavar="OUT_DIR", help="the folder to write PNG files into")
    reconstruct = add_command(
        commands,
        "reconstruct",
        "images:reconstruct",
        "encode and decode photographs; pictures, PSNR, SSIM",
    )
    add_model(reconstruct)
    add_photos(reconstruct)
    reconstruct.add_argument(
        "out", metavar="OUT", help="the folder to write to: pictures, metrics.json, of a folder also contact-sheet.png"
    )
    for command in (encode, decode, reconstruct):
        add_machine(command)
        command.add_argument("--overwrite", action="store_true", help="write although something is there already")


def add_tokenizers(commands: Commands) -> None:
    """Add inspect, fit-stats and average."""
    inspect = add_command(
        commands, "inspect", "inspect:inspect", "show a model: parameters, tokens, FLOPs, latent statistics"
    )
    add_model(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON for programs instead of tables")
    stats = add_command(commands, "fit-stats", "stats:fit_stats", "fit what normalises latents on photographs, save it")
    add_model(stats)
    add_photos(stats, name="DATA")
    stats.add_argument("--per-channel", action="store_true", help="one mean and deviation per channel, not one for all")
    stats.add_argument("--out", metavar="DIR", help="save the model here (default: the folder MODEL itself)")
    stats.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
    add_machine(stats)
    average = add_command(commands, "average", "average:average", "save a run's model with a longer or shorter average")
    average.add_argument("run_dir", metavar="RUN", help="the folder of a finished run that kept other averages")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--length",
        type=float,
        metavar="L",
        help="put together from those of train.ema_lengths: the profile's deviation as a fraction of the run, 0.001 to "
        "0.288",
    )
    which.add_argument("--decay", type=float, metavar="D", help="one of train.more_ema_decays, as it is")
    average.add_argument("--out", required=True, metavar="DIR", help="save the model here")
    average.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
