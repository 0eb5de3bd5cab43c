"""From labels to pictures: how much faster few tokens are than a grid of latents, and what that is made of.

    softvq bench all benchmarks/results/h200
    python benchmarks/end_to_end.py benchmarks/results/h200/*.json

It measures nothing: it puts together the steps and decodings that `softvq bench` timed on one machine. Both sides have
SiT-XL, guidance, the same solver and the same harness. The grids' decoder is not ours and left out, which favours
them. A ratio of images per second is the product of three:

    tokens       both compiled, as many steps: what fewer tokens bring, less the time that decoding takes
    kernels      the grid as plain bfloat16 PyTorch over the grid compiled: what the fast path brings
    evaluations  few tokens with fewer steps of a better solver, over as many steps as the grid has
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from softvq.commands.bench import BenchReport
from softvq.commands.bench_jobs import Row
from softvq.config import from_dict, read_json
from softvq.errors import InputError

PAIRS = {
    "256 px": ("sit-xl, 256 tokens", (("sit-xl, 32 tokens", "softvq-l-32"), ("sit-xl, 64 tokens", "softvq-l-64"))),
    "512 px": ("sit-xl, 1024 tokens", (("sit-xl, 64 tokens", "softvq-bl-64"),)),
}
"""The grid and, with their tokenizers, the few tokens that stand against it, by size of the pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A row of the table."""

    size: str
    """Of the pictures."""
    few: str
    """The generator on few tokens."""
    grid: str
    """The generator on the grid."""
    precision: str
    """Of both where they are compiled."""
    images_per_sec: float
    """Of few tokens, compiled, with as many steps as the grid."""
    tokens: float
    """Over the grid, compiled."""
    kernels: float | None
    """Of the grid compiled over the grid as it is; None where that was not timed."""
    evaluations: float
    """Of few tokens with fewer steps over few tokens."""

    @property
    def equal_steps(self) -> float | None:
        """Return what few tokens and kernels make together."""
        return None if self.kernels is None else self.tokens * self.kernels

    @property
    def all(self) -> float | None:
        """Return the product of all three."""
        return None if self.kernels is None else self.tokens * self.kernels * self.evaluations


def ratios(rows: Sequence[Row], steps: int, fewer: int) -> list[Ratio]:
    """Return the ratios that rows of one machine allow.

    Args:
        rows: Of `softvq bench`, steps and decodings.
        steps: Of the sampler on both sides.
        fewer: Steps of the better solver, of one evaluation each.

    Returns:
        One for each pair and each precision in which both were timed.
    """
    found = []
    for size, (grid, others) in PAIRS.items():
        plain = _seconds(rows, "step", grid, "bf16", compiled=False)
        for (few, tokenizer), precision in ((pair, name) for pair in others for name in ("bf16", "fp8")):
            step = _seconds(rows, "step", few, precision)
            decode = _seconds(rows, "decode", tokenizer, precision)
            wide = _seconds(rows, "step", grid, precision)
            if step is None or decode is None or wide is None:
                continue
            found.append(
                Ratio(
                    size=size,
                    few=few,
                    grid=grid,
                    precision=precision,
                    images_per_sec=1 / (steps * step + decode),
                    tokens=steps * wide / (steps * step + decode),
                    kernels=None if plain is None else plain / wide,
                    evaluations=(steps * step + decode) / (fewer * step + decode),
                )
            )
    return found


def _seconds(rows: Sequence[Row], job: str, model: str, precision: str, *, compiled: bool = True) -> float | None:
    """Return the seconds of an image."""
    for row in rows:
        if (row.job, row.model, row.precision, row.compiled) == (job, model, precision, compiled):
            return row.seconds / row.batch
    return None


def markdown(found: Sequence[Ratio], steps: int, fewer: int) -> str:
    """Return the table."""
    heads = ["pictures", "few tokens", "against", "precision", f"images/s, {steps} steps", "tokens", "kernels"]
    heads += ["tokens x kernels", f"evaluations, {steps} to {fewer}", "all three"]
    lines = [heads, ["---"] * 4 + ["---:"] * 6]
    for each in found:
        numbers = [each.tokens, each.kernels, each.equal_steps, each.evaluations, each.all]
        shown = ["" if number is None else f"{number:.3g}x" for number in numbers]
        lines.append([each.size, each.few, each.grid, each.precision, f"{each.images_per_sec:.3g}", *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print the table; return 2 if files are of several machines or have nothing to compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="a JSON file of softvq bench")
    parser.add_argument("--steps", type=int, default=250, help="of both sides (default: 250)")
    parser.add_argument("--fewer", type=int, default=25, help="of the better solver (default: 25)")
    arguments = parser.parse_args()
    try:
        reports = [from_dict(BenchReport, read_json(path), str(path)) for path in arguments.results]
        machines = {(report.machine, report.torch) for report in reports}
        if len(machines) > 1:
            raise InputError(f"the files are of {len(machines)} machines or versions; give those of one")
        found = ratios([row for report in reports for row in report.rows], arguments.steps, arguments.fewer)
        if not found:
            raise InputError("no file has both a step on few tokens, its decoding and a step on the grid")
    except InputError as error:
        print(f"end_to_end.py: {error}", file=sys.stderr)
        return 2
    machine, torch = machines.pop()
    print(f"{machine}, torch {torch}\n\n{markdown(found, arguments.steps, arguments.fewer)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
