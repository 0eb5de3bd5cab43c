"""Arguments of the commands that need no model."""

from softvq.arguments.shared import Commands, add_command, positive

__all__ = ["add_others"]


def add_others(commands: Commands) -> None:
    """Add doctor, demo and version."""
    add_command(
        commands, "doctor", "doctor:doctor", "show what is installed, which devices there are, and what will be slow"
    )
    demo = add_command(
        commands, "demo", "demo:demo", "show what bundled models do, or train a tiny tokenizer and show what it learned"
    )
    demo.add_argument("--out", default="softvq-demo", metavar="DIR", help="where to write (default: softvq-demo)")
    demo.add_argument(
        "--train",
        action="store_true",
        help="train a tiny tokenizer on bundled photographs, which is done too where no model is bundled",
    )
    demo.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="train so many steps instead of the recipe's, which take about two minutes; implies --train",
    )
    demo.add_argument("--seed", type=int, default=0, help="what all randomness derives from (default: 0)")
    demo.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    add_command(commands, "version", "version:version", "print the version")
