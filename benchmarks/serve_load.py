"""Measure what `softvq serve` does: one client, many, and twice as many requests as it can answer.

    python benchmarks/serve_load.py [--tokenizer photos-64] [--generator flowers-dit] [--seconds 120] [--out load.json]

Starts the server on loopback in a process of its own. Clients run in this one, on the same machine, and take their part
of it. Prints a table and writes it as JSON. Fails if a request is lost, or refused without saying when to ask again.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import serving_campaigns as campaigns
from tests.program import photograph, png
from tests.serving_campaigns import Ask

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Start a server; yield its port and its process."""
    command = [sys.executable, "-m", "softvq", "serve", "--tokenizer", arguments.tokenizer, "--port", "0"]
    command += ["--generator", arguments.generator, "--batch-size", str(arguments.batch), "--device", arguments.device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http://127.0.0.1:" not in line:
            raise SystemExit(f"the server did not start: {' '.join(map(str, command))}")
        try:
            yield int(line.split(" at http://127.0.0.1:")[1].split()[0]), process.pid
        finally:
            process.terminate()
            if process.wait(60):
                raise SystemExit(f"the server ended with {process.returncode}")


def requests(arguments: argparse.Namespace) -> dict[str, Callable[[int], Ask]]:
    """Return what is asked, by what it is called."""
    photo = png(photograph(256, 256))

    def generate(number: int) -> Ask:
        body = {"labels": [0], "seeds": [number], "steps": arguments.steps}
        return Ask("POST", "/v1/generate", json.dumps(body).encode(), "application/json")

    return {
        "reconstruct": lambda number: Ask("POST", "/v1/reconstruct", photo),
        "encode": lambda number: Ask("POST", "/v1/encode?format=safetensors", photo),
        f"generate, {arguments.steps} steps": generate,
    }


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return everything measured."""
    found: dict[str, Any] = {"machine": arguments.machine or f"{platform.machine()}, {os.cpu_count()} cores"}
    found |= {"threads": torch.get_num_threads(), "versions": {"torch": torch.__version__}, "rows": []}
    with server(arguments) as (port, pid):
        for name, ask in requests(arguments).items():
            campaigns.closed_loop(port, ask, 1, 0.0)  # the first call is slow
            for what, clients in (("one client", 1), (f"{2 * arguments.batch} clients", 2 * arguments.batch)):
                console.print(f"{name}, {what} ...", highlight=False)
                row = campaigns.closed_loop(port, ask, clients, arguments.closed_seconds)
                found["rows"].append({"request": name, "load": what, **row})
        found["batch_difference"] = campaigns.batch_difference(port, 0, 8)
        rate = arguments.rate or 2 * found["rows"][1]["requests_per_second"]
        ask = requests(arguments)["reconstruct"]
        console.print(f"reconstruct, {rate:.1f} requests/s for {arguments.seconds:g} s ...", highlight=False)
        found["overload"] = {
            "seconds": arguments.seconds,
            **campaigns.overload(port, ask, rate, arguments.seconds, pid),
        }
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table("request", "load", "requests/s", "p50, ms", "p99, ms", title=found["machine"])
    for row in found["rows"]:
        figures = (f"{row['requests_per_second']:.1f}", f"{1000 * row['p50']:.0f}", f"{1000 * row['p99']:.0f}")
        table.add_row(row["request"], row["load"], *figures)
    console.print(table)
    over = found["overload"]
    memory = over["memory_mib"]
    console.print(
        f"{over['seconds']:g} s of {over['offered_per_second']:.1f} requests/s: {over['sent']} sent, "
        f"{over['answered']} answered ({over['answered_per_second']:.1f}/s, p50 {over.get('p50', 0):.2f} s, "
        f"p99 {over.get('p99', 0):.2f} s), {over['refused']} refused with 503 and Retry-After, "
        f"{sum(over['lost_or_other'].values())} lost or other",
        f"memory: {memory['first']:.0f} MiB at first, {memory['last']:.0f} at last, {memory['most']:.0f} at most; mean "
        f"of the last quarter {memory['growth']:+.1f} MiB from that of the second",
        f"an image alone and in a batch of 8 differs by at most {found['batch_difference']} of 256 levels",
        sep="\n",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="photos-64")
    parser.add_argument("--generator", default="flowers-dit")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--closed-seconds", type=float, default=15.0, help="of one client, and of many")
    parser.add_argument("--seconds", type=float, default=120.0, help="of twice the capacity")
    parser.add_argument("--rate", type=float, help="requests a second in place of twice the capacity")
    parser.add_argument("--machine", help="its name, for the table")
    parser.add_argument("--out", type=Path, default=Path("serve_load.json"))
    arguments = parser.parse_args()
    console = Console()
    found = measure(arguments, console)
    show(found, console)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    if found["overload"]["lost_or_other"]:
        raise SystemExit(f"requests were lost: {found['overload']['lost_or_other']}")


if __name__ == "__main__":
    main()
