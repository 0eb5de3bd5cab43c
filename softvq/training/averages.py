"""Averages of the weights: exponential ones, power-function ones, and those put together after training.

An average of weights is their sum over all steps with a profile: which steps count how much. The profile of a
power-function average after t updates is s^gamma for s from 0 to t, so that it covers the same share of every run; its
relative length is the profile's standard deviation divided by t (arXiv:2312.02696, section 3.1). Sums of such averages,
kept at several steps, come near the profiles of all other lengths, so that the best length can be sought after training
(section 3.2 there).
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.files import read_tensors, write_tensors
from softvq.ranks import is_main
from softvq.training import sharding
from softvq.training.optim import copy_named

__all__ = [
    "Averages",
    "Ema",
    "check_averages",
    "check_length",
    "ema_decay_at",
    "find_snapshots",
    "post_hoc_average",
    "post_hoc_shares",
    "power_decay_at",
    "power_exponent",
    "save_snapshot",
    "snapshot_profiles",
]

MIN_LENGTH, MAX_LENGTH = 0.001, 0.288
"""Relative lengths of power-function averages; a mean of all steps alike has 1 / sqrt(12)."""
FORMAT = "softvq-averages"
NAME = re.compile(r"step-(\d{8,})\.safetensors")
SMALLEST_DIRECTION = 1e-13
"""Of the system of profiles, relative to its largest: below it there is only the rounding of float64."""


def ema_decay_at(decay: float, step: int) -> float:
    """Return the decay after `step` updates: min(decay, (1 + step) / (10 + step)), so that early noise is forgotten."""
    return min(decay, (1 + step) / (10 + step))


def power_decay_at(gamma: float, step: int) -> float:
    """Return the decay of a power-function average: (1 - 1 / step)^(gamma + 1), arXiv:2312.02696, section 3.1.

    Args:
        gamma: Exponent of the profile, at least 0.
        step: Finished updates, at least 1; at 1 the average is the weights.

    Returns:
        Share of the old average that is kept, at least 0 and below 1.
    """
    return (1 - 1 / step) ** (gamma + 1)


def check_length(length: float, name: str) -> None:
    """Refuse what is no relative length of a power-function average.

    Args:
        length: Standard deviation of the profile, as a fraction of all steps.
        name: Of the field, for errors.

    Raises:
        InputError: If it is too small or too large.
    """
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise InputError(f"{name} is {length}, expected {MIN_LENGTH} to {MAX_LENGTH} of the run")


def power_exponent(length: float) -> float:
    """Return the exponent of the power function that has a relative length, the gamma of at least 0 in this equation.

        length = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)      arXiv:2312.02696, section 3.1

    Args:
        length: From 0.001 to 0.288.

    Returns:
        Gamma, the larger the shorter.

    Raises:
        InputError: If the length is out of its range.
    """
    check_length(length, "length")
    low, high = 0.0, 2 / length  # the right side falls from gamma = 0 on, and stays below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        if math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > length:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def check_averages(decay: float, more_decays: Sequence[float], lengths: Sequence[float]) -> None:
    """Refuse averages that are out of their range or are kept twice.

    Args:
        decay: Of the main average.
        more_decays: Of the other exponential averages.
        lengths: Of the power-function averages.

    Raises:
        InputError: Naming the field of the recipe.
    """
    for name, value in (("ema_decay", decay), *(("more_ema_decays", value) for value in more_decays)):
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}, expected at least 0 and below 1")
    for length in lengths:
        check_length(length, "ema_lengths")
    for name, values, taken in (
        ("more_ema_decays", more_decays, {decay}),
        ("ema_lengths", lengths, set()),
    ):
        if len({*values} | taken) < len(values) + len(taken):
            raise InputError(f"{name} is {list(values)}, expected each average once, the main one not again")


class Ema:
    """A moving average of a module's trainable parameters, in float32.

    Frozen parameters do not change and buffers are not averaged, so both are those of the module itself.

    Args:
        module: What is being trained; its parameters are float32, without gaps in memory.
        decay: Share of the old average kept at an update, 0 to 1, by `ema_decay_at`; or what gives it from the updates.
    """

    def __init__(self, module: nn.Module, decay: float | Callable[[int], float]) -> None:
        self.decay_at = decay if callable(decay) else functools.partial(ema_decay_at, decay)
        self._whole: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = {name: sharding.local(p) for name, p in self._whole.items()}
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move the average towards the weights, after `step` finished updates; see `Averages.update`."""
        old, share = [*self.averages.values()], 1 - self.decay_at(step)
        if not old:
            return
        if share == 1:  # from 0 they become exactly the weights, which a - (a - w) is not
            torch._foreach_mul_(old, 0.0 if skip is None else skip)
        # a - share (a - w) as SGD up the gradient w, decayed by 1: the only such kernel that can be told to skip
        how = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": True}
        torch._fused_sgd_(old, [*self.parameters.values()], [], lr=share, is_first_step=False, found_inf=skip, **how)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the averages to the module; its own weights are back afterwards, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        copy_named(self.parameters, self.averages, "average")
        try:
            yield
        finally:
            copy_named(self.parameters, own, "module")

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, spread over the ranks as the parameters are."""
        return {name: sharding.as_spread(value, self._whole[name]) for name, value in self.averages.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        copy_named(self.state(), tensors, "average")


class Averages:
    """Every average of a run: the main one, `ema`, and others named `ema_DECAY` and `power_LENGTH`.

    Args:
        module: What is being trained.
        decay: Of the main average.
        more_decays: Of other exponential averages.
        lengths: Relative lengths of power-function averages.
    """

    def __init__(
        self, module: nn.Module, decay: float, more_decays: Sequence[float] = (), lengths: Sequence[float] = ()
    ) -> None:
        check_averages(decay, more_decays, lengths)
        self.main = Ema(module, decay)
        self.power = {
            float(length): Ema(module, functools.partial(power_decay_at, power_exponent(length))) for length in lengths
        }
        self.others = {f"ema_{float(other)}": Ema(module, other) for other in more_decays}
        self.others |= {f"power_{length}": average for length, average in self.power.items()}

    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move all averages towards the weights, after `step` finished updates; not where `skip`, a scalar, is 1."""
        for average in (self.main, *self.others.values()):
            average.update(step, skip)

    def named(self, name: str | None = None) -> Ema:
        """Return an average by its name, for example `power_0.1`; None is the main one.

        Args:
            name: `ema`, `ema_DECAY` or `power_LENGTH`, as the run keeps them.

        Returns:
            The average.

        Raises:
            InputError: If the run keeps no such average.
        """
        if name in (None, "ema"):
            return self.main
        if name not in self.others:
            raise InputError(f"average is {name!r}, expected one of {', '.join(['ema', *self.others])}")
        return self.others[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the main average as `ema`, and the tensors of the others as `NAME.parameter` of `averages`."""
        more = {
            f"{name}.{key}": value for name, average in self.others.items() for key, value in average.state().items()
        }
        return {"ema": self.main.state(), "averages": more}

    def load_state(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned."""
        self.main.load_state(parts["ema"])
        copy_named(self.state()["averages"], parts["averages"], "average")

    def save_snapshot(self, run: Path, step: int) -> None:
        """Keep the power-function averages, if there are any, as `averages/step-00000100.safetensors` of a run, say.

        Args:
            run: Folder of the run, whose lock the caller holds. Its first rank writes, what all that have parts send.
            step: Finished updates.

        Raises:
            RunError: If the file cannot be written.
        """
        kept = {length: sharding.gathered(average.state()) for length, average in self.power.items()}
        if kept and is_main():
            save_snapshot(run, step, kept)


def save_snapshot(run: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write power-function averages of one step, in the place of what was there of that step.

    Args:
        run: Folder of the run, whose lock the caller holds.
        step: Finished updates.
        averages: By relative length, then by parameter name.

    Raises:
        RunError: If the file cannot be written; what was there before is untouched.
    """
    path = run / "averages" / f"step-{step:08d}.safetensors"
    for leftover in path.parent.glob(".step-*.tmp.safetensors"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    tensors = {f"power_{length}.{name}": value for length, each in averages.items() for name, value in each.items()}
    header = {"version": 1, "step": step, "lengths": [*averages]}
    write_tensors(path, tensors, {FORMAT: json.dumps(header)})  # one entry, because several come in any order


def find_snapshots(run: Path) -> list[Path]:
    """Return the files of kept averages of a run, the oldest first."""
    folder = run / "averages"
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))


def post_hoc_shares(
    profiles: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[Float[Tensor, " profile"], float]:
    """Return how much of each kept average makes up one of another length, and how near its profile comes.

    The wanted profile is fitted by least squares, whose inner products are known in closed form:

        p(s) = (gamma + 1) s^gamma / t^(gamma + 1)   for 0 <= s <= t, else 0
        <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)  (t_a / t_b)^gamma_b / t_b   for t_a <= t_b

    as in arXiv:2312.02696, section 3.2, but under the condition that the shares sum to one, so that what training never
    moved stays what it is.

    Args:
        profiles: Step and relative length of each kept average.
        step: At which the wanted average ends.
        length: Of the wanted average.

    Returns:
        The shares, in float64, and how far the profile they make is from the wanted one, as a fraction of its norm.

    Raises:
        InputError: If there are no profiles, or a length is out of its range.
    """
    if not profiles:
        raise InputError("profiles is empty, expected at least one kept average")
    ends = torch.tensor([end / step for end, _ in profiles] + [1.0], dtype=torch.float64)
    exponents = torch.tensor([power_exponent(each) for _, each in profiles] + [power_exponent(length)]).double()
    products = _inner_products(ends, exponents)
    gram, wanted, norm = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    scale = gram.diagonal().sqrt()
    system = torch.zeros(len(scale) + 1, len(scale) + 1, dtype=torch.float64)
    system[:-1, :-1] = gram / scale[:, None] / scale
    system[-1, :-1] = system[:-1, -1] = 1 / scale  # the multiplier of the condition
    right = torch.cat([wanted / scale, torch.ones(1, dtype=torch.float64)])
    solution = torch.linalg.pinv(system, rtol=SMALLEST_DIRECTION, hermitian=True) @ right
    shares = solution[:-1] / scale
    shares = shares / shares.sum()
    error = (shares @ gram @ shares - 2 * shares @ wanted + norm).clamp(min=0).sqrt() / norm.sqrt()
    return shares, float(error)


def snapshot_profiles(snapshots: Sequence[Path]) -> list[tuple[int, float]]:
    """Return the step and the relative length of each average that files hold, in the order of the files.

    Args:
        snapshots: Of one run, as `find_snapshots` returns them; the first is read for the lengths.

    Returns:
        As `post_hoc_shares` takes them.

    Raises:
        InputError: If there are none, or the first is broken.
    """
    if not snapshots:
        raise InputError("snapshots is empty, expected files of kept averages")
    _, lengths = _read_snapshot(snapshots[0])
    return [(_step_of(path), length) for path in snapshots for length in lengths]


def post_hoc_average(snapshots: Sequence[Path], sigma_rel: float) -> dict[str, Tensor]:
    """Return the average of another relative length at the newest of the kept steps, see `post_hoc_shares`.

    Args:
        snapshots: As `find_snapshots` returns them; they are read one at a time, and summed in float64.
        sigma_rel: The relative length.

    Returns:
        Float32 tensors by parameter name.

    Raises:
        InputError: If there are no snapshots, one is broken or of another run, or the length is out of its range.
    """
    check_length(sigma_rel, "length")
    profiles = snapshot_profiles(snapshots)
    shares, _ = post_hoc_shares(profiles, max(step for step, _ in profiles), sigma_rel)
    lengths = [length for _, length in profiles[: len(profiles) // len(snapshots)]]
    total: dict[str, Tensor] = {}
    layout: dict[str, torch.Size] = {}
    for path, row in zip(snapshots, shares.view(len(snapshots), -1).tolist(), strict=True):
        tensors, found = _read_snapshot(path)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        layout = layout or shapes
        if found != lengths or shapes != layout:
            raise InputError(f"{path}: holds other averages than {snapshots[0].name}; put back what is of this run")
        share_of = dict(zip((f"power_{length}." for length in lengths), row, strict=True))
        for key, tensor in tensors.items():
            prefix = next(prefix for prefix in share_of if key.startswith(prefix))
            name, part = key.removeprefix(prefix), share_of[prefix] * tensor.double()
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}


def _inner_products(ends: Tensor, exponents: Tensor) -> Tensor:
    """Return the inner products of all pairs of profiles; see `post_hoc_shares`."""
    early = ends[:, None] <= ends
    t_a, t_b = torch.minimum(ends[:, None], ends), torch.maximum(ends[:, None], ends)
    gamma_b = torch.where(early, exponents, exponents[:, None])
    factor = (exponents[:, None] + 1) * (exponents + 1) / (exponents[:, None] + exponents + 1)
    return factor * (t_a / t_b) ** gamma_b / t_b


def _step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    if not match:
        raise InputError(f"{path}: is no file of kept averages, which is named like step-00000100.safetensors")
    return int(match[1])


def _read_snapshot(path: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Return the tensors of a file of kept averages and their relative lengths."""
    step = _step_of(path)
    tensors, text = read_tensors(path)
    lengths: list[float] = []
    try:
        header = json.loads(text[FORMAT])
        lengths = [float(length) for length in header["lengths"]]
        known = header["version"] == 1 and header["step"] == step
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise InputError(f"{path}: does not hold averages of the step in its name that softvq kept; fetch it again")
    if any(not key.startswith(tuple(f"power_{length}." for length in lengths)) for key in tensors):
        raise InputError(f"{path}: holds tensors that are not of its averages; fetch it again")
    return tensors, lengths
