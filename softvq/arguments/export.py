"""Arguments of softvq export."""

from softvq.arguments.sampling import SAMPLERS
from softvq.arguments.shared import Commands, add_command, positive

__all__ = ["add_export"]


def add_export(commands: Commands) -> None:
    """Add export."""
    export = add_command(
        commands, "export", "export:export", "write a part of a model as a file that runs without softvq"
    )
    export.add_argument("model", metavar="MODEL", help="a tokenizer's folder or name, for --part sampler a generator's")
    export.add_argument("out", metavar="OUT", help="the file to write, NAME.onnx or NAME.pt2; facts go to OUT.json")
    export.add_argument("--format", choices=("torch", "onnx"), help="torch.export or ONNX (default: as OUT ends)")
    export.add_argument(
        "--part",
        choices=("encoder", "decoder", "sampler"),
        default="encoder",
        help="pixels to latents, latents to pixels, or noise and labels to pixels (default: encoder)",
    )
    export.add_argument(
        "--precision",
        choices=("float32", "bf16", "int8"),
        default="float32",
        help="of weights and products: bf16 for torch, int8 for ONNX; both lose something (default: float32)",
    )
    export.add_argument(
        "--tokens", type=positive, metavar="N", help="a decoder of the first so many tokens (default: all)"
    )
    stored = "(default: as stored with the model)"
    export.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="of the sampler, each of which is in the file (default: 10)",
    )
    export.add_argument("--sampler", choices=SAMPLERS, help=f"one that draws no noise in its steps {stored}")
    export.add_argument("--guidance", type=float, metavar="X", help=f"scale that is in the file {stored}")
    export.add_argument("--latents", action="store_true", help="a sampler that leaves the latents unpainted")
    export.add_argument("--tokenizer", metavar="MODEL", help="a sampler's tokenizer, if not where the model says")
    export.add_argument("--overwrite", action="store_true", help="write although something is there already")
