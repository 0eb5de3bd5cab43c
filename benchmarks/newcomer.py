"""Do what docs/quickstart.md says, in a clean clone, and print how long each command took.

    python benchmarks/newcomer.py --out FOLDER --machine "two cores of an Intel Xeon, no GPU"

The commands are those of the page, as they stand there, in one shell. FOLDER must not be there yet. The load is that of
`uptime`: where it is more than one before, other programs take their share, and the times are too long.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/quickstart.md"
KEPT = ("HOME", "LANG", "PATH", "PIP_CACHE_DIR", "PIP_CONFIG_FILE", "PIP_INDEX_URL", "SSL_CERT_FILE", "TMPDIR")


def commands(text: str) -> list[str]:
    """Return the lines of a page's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


def timed(lines: list[str], folder: Path, times: Path) -> list[float]:
    """Run lines in one shell and return the seconds of each; what fails ends it."""
    stamp = 'echo "$EPOCHREALTIME" >>"$TIMES"'
    script = "\n".join(["set -e", stamp, *(f"{line}\n{stamp}" for line in lines)])
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"LC_ALL": "C.UTF-8", "TIMES": str(times)}
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True, stdout=sys.stderr)
    stamps = [float(line) for line in times.read_text().split()]
    return [end - start for start, end in itertools.pairwise(stamps)]


def table(lines: list[str], seconds: list[float]) -> str:
    """Return a Markdown table of the commands and their times."""
    rows = [f"| `{line}` | {value:.1f} |" for line, value in zip(lines, seconds, strict=True)]
    return "\n".join(["| command | s |", "| --- | ---: |", *rows, f"| together | {sum(seconds):.1f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="clean folder to work in")
    parser.add_argument("--machine", default="this machine", help="what the table says it was measured on")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    clone = arguments.out.resolve() / "softvq"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    busy = os.getloadavg()[1]
    lines = commands(PAGE.read_text(encoding="utf-8"))
    seconds = timed(lines, clone, arguments.out.resolve() / "times.txt")
    busy = f"{busy:.1f} before, {os.getloadavg()[1]:.1f} after"
    print(f"On {arguments.machine}; load in five minutes {busy}:\n\n{table(lines, seconds)}")


if __name__ == "__main__":
    main()
