"""Fuzz `softvq serve` from its own OpenAPI schema: nothing may give a 5xx, a traceback, or no answer.

    python benchmarks/serve_fuzz.py [--tokenizer photos-64] [--generator flowers-dit] [--examples 2000]

Sends requests made from the schema by hypothesis, damaged ones, and requests for what there is not; then, if it is
installed (`pip install schemathesis`), has schemathesis do the same its own way.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from serve_load import server

from tests import serving_campaigns as campaigns
from tests.program import photograph, png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="photos-64")
    parser.add_argument("--generator", default="flowers-dit")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--examples", type=int, default=2000)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with server(arguments) as (port, pid):
        before = campaigns.resident(pid)
        found = campaigns.fuzz(port, png(photograph(256, 256)), arguments.examples)
        console.print(
            f"{found['requests']} requests, answered {found['by_status']}, the slowest in "
            f"{found['slowest_seconds']:.1f} s; memory {before:.0f} MiB before, {campaigns.resident(pid):.0f} after"
        )
        tool = shutil.which("schemathesis") or shutil.which("schemathesis", path=str(Path(sys.executable).parent))
        if tool is None:
            console.print("schemathesis is not installed, so it was left out")
            return
        command = [tool, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", str(max(1, arguments.examples // 40)), "--request-timeout", "60", "--seed", "1"]
        command += ["--generation-database", "none", "--no-color"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        with contextlib.suppress(ValueError):
            console.print(result.stdout[result.stdout.rindex("SUMMARY") - 40 :].strip("= \n"), markup=False)
        if result.returncode:
            console.print(result.stdout[-8000:] + result.stderr[-2000:], markup=False)
            raise SystemExit("schemathesis found something")


if __name__ == "__main__":
    main()
