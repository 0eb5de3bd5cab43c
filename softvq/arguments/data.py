"""Arguments of `softvq data`."""

from softvq.arguments.shared import Commands, add_command, natural, positive

__all__ = ["add_data"]


def add_data(commands: Commands) -> None:
    """Add data check and data pack."""
    data = commands.add_parser("data", help="check or pack photographs", description="Check or pack photographs.")
    kinds = data.add_subparsers(title="jobs", metavar="JOB", required=True, dest="job")
    check = add_command(kinds, "check", "data:check", "decode every photograph of a set and say what is wrong with it")
    check.add_argument("source", metavar="SOURCE", help="a folder, tar shards (a folder, pattern or URL), or hf:NAME")
    check.add_argument("--val", metavar="SOURCE", help="held-out photographs, none of which should be in SOURCE too")
    check.add_argument(
        "--min-side", type=positive, default=64, metavar="N", help="list those of a shorter side (default: 64)"
    )
    check.add_argument(
        "--max-pixels", type=positive, default=64_000_000, metavar="N", help="larger ones count as unreadable"
    )
    check.add_argument("--workers", type=natural, default=0, metavar="N", help="threads that decode (default: 0)")
    check.add_argument("--json", action="store_true", help="print JSON for programs instead of tables")
    pack = add_command(kinds, "pack", "data:pack", "pack a folder of photographs into tar shards with an index")
    pack.add_argument("folder", metavar="FOLDER", help="the photographs; its subfolders are the classes")
    pack.add_argument("out", metavar="OUT", help="the folder of the shards; one that was interrupted is gone on with")
    pack.add_argument(
        "--shard-megabytes", type=positive, default=256, metavar="N", help="largest size of a shard (default: 256)"
    )
