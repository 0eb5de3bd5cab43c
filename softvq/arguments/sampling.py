"""Arguments of `softvq sample`."""

from softvq.arguments.shared import Commands, add_command, positive

__all__ = ["SAMPLERS", "add_sample"]

SAMPLERS = ("euler", "heun", "ab2", "euler_maruyama", "dpm++", "dpm++_sde", "ddpm", "ddim")
"""By their names in recipes."""


def add_sample(commands: Commands) -> None:
    """Add sample."""
    sample = add_command(
        commands, "sample", "sample:sample", "make images with a generator: PNG files, a grid, an .npz file"
    )
    sample.add_argument("model", metavar="MODEL", help="a generator's folder, or a name on the Hugging Face hub")
    sample.add_argument("out", metavar="OUT", help="the folder to write to")
    sample.add_argument("--classes", metavar="A,B,...", help="names or numbers, taken in turn (default: all)")
    sample.add_argument("--n", type=positive, default=16, metavar="N", help="images in all (default: 16)")
    sample.add_argument("--seed", type=int, default=0, help="the same seed makes the same images (default: 0)")
    stored = "(default: as stored with the model)"
    sample.add_argument("--sampler", choices=SAMPLERS, help=f"how noise becomes latents {stored}")
    sample.add_argument("--steps", type=int, metavar="N", help=f"steps of the sampler {stored}")
    sample.add_argument("--head-steps", type=int, metavar="N", help=f"steps of MAR's head {stored}")
    sample.add_argument("--shift", type=float, metavar="X", help=f"shift of a flow's times to the noisy end {stored}")
    sample.add_argument("--temperature", type=float, metavar="X", help=f"deviation of the noise {stored}")
    sample.add_argument("--guidance", type=float, metavar="X", help=f"guidance scale, 1 is none {stored}")
    sample.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"where it acts, 0 to 1 {stored}"
    )
    sample.add_argument(
        "--guidance-schedule", choices=("constant", "linear", "cosine"), help=f"how it grows towards the data {stored}"
    )
    sample.add_argument("--guide", metavar="MODEL", help="a worse generator to guide away from (autoguidance)")
    sample.add_argument("--tokenizer", metavar="MODEL", help="the tokenizer, if it is not where the model says")
    sample.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (default: 64)")
    sample.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    sample.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp8"),
        default="auto",
        help="auto is bf16 on a GPU; fp8 is for CUDA, and compiles (default: auto)",
    )
    sample.add_argument("--compile", action="store_true", help="compile the networks: a slow start, then faster")
    sample.add_argument("--overwrite", action="store_true", help="write although something is there already")
