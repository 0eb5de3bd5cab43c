"""What a training takes, before it is begun: an update is gone through with tensors of shapes without numbers."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from softvq.backbones import FrozenBackbone, compute_dtype, load_backbone
from softvq.data.folder import Batch
from softvq.data.latent_set import LatentBatch
from softvq.generators.generator import LatentGenerator
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.adversary import Adversary
from softvq.training.blocks import recompute_activations
from softvq.training.generator_recipe import GeneratorRunConfig
from softvq.training.generator_task import GeneratorTask
from softvq.training.optim import parameter_groups
from softvq.training.rehearsal import heaviest_step, phases
from softvq.training.task import Task
from softvq.training.tokenizer_recipe import TokenizerRunConfig
from softvq.training.tokenizer_task import TokenizerTask

__all__ = [
    "DEVICES",
    "Device",
    "Estimate",
    "PhaseEstimate",
    "estimate_generator",
    "estimate_tokenizer",
    "untrained_task",
]

COUNTED, HELD = 1, 16
"""Images in the updates that are gone through: for operations, and for memory, of which most is then images'."""
FLOAT = 4
"""Bytes of float32."""


class Device(NamedTuple):
    """What a maker publishes of a GPU."""

    bf16: float
    """Floating-point operations a second of dense bf16 matrix products with float32 sums."""
    fp32: float
    """Of float32, without TF32."""
    memory: int
    """Bytes."""


DEVICES = {
    "h100": Device(989e12, 67e12, 80 * 10**9),
    "h200": Device(989e12, 67e12, 141 * 10**9),
    "a100": Device(312e12, 19.5e12, 80 * 10**9),
    "4090": Device(165e12, 82.6e12, 24 * 10**9),
}
"""H100 and H200 in their SXM form, the A100 with 80 GB; from NVIDIA's data sheets, without sparsity."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEstimate:
    """A part of a run in which the same things are computed."""

    name: str
    """What is computed."""
    steps: int
    """Updates of the run that belong to it."""
    flops: int
    """Floating-point operations of one image in an update, recomputed activations among them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one process of a training holds and computes; sizes in bytes."""

    trained: int
    """Numbers that are trained, those of a discriminator among them."""
    frozen: int
    """Numbers of networks that are only looked at, such as a teacher."""
    batch_size: int
    """Images of an update, over all processes."""
    phases: tuple[PhaseEstimate, ...]
    """In order."""
    weights: int
    """Of everything, frozen networks among it."""
    gradients: int
    """Of what is trained."""
    optimizer: int
    """Running means."""
    averages: int
    """Of the weights."""
    activations: int
    """Most that one micro-batch needs at once beside all that, in the phase that needs the most."""

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations

    def seconds(self, flops_per_second: float, processes: int) -> float:
        """Return how long the whole run takes.

        Args:
            flops_per_second: That each process really reaches.
            processes: That share the work evenly.

        Returns:
            Seconds.
        """
        total = sum(phase.steps * phase.flops for phase in self.phases) * self.batch_size
        return total / flops_per_second / processes

    def images_per_second(self, phase: PhaseEstimate, flops_per_second: float, processes: int) -> float:
        """Return the images a second of all processes in a phase; arguments as for `seconds`."""
        return flops_per_second * processes / phase.flops


def estimate_tokenizer(config: TokenizerRunConfig, processes: int = 1) -> Estimate:
    """Estimate the training of a tokenizer.

    Args:
        config: The recipe; weights of networks that it names are neither looked for nor needed.
        processes: That share it.

    Returns:
        The estimate.
    """
    parts, size = phases(config), config.model.image_size
    ends = [*(part.first_step for part in parts[1:]), config.train.steps]
    with torch.device("meta"):
        task = untrained_task(config)
    with _shapes_only(task):

        def batch(count: int) -> Batch:
            images, labels = torch.zeros(count, 3, size, size), torch.zeros(count, dtype=torch.int64)
            return Batch(images=images, labels=labels, positions=torch.arange(count), skipped=[])

        steps = [heaviest_step(task, part.first_step) for part in parts]
        named = [(part.name, end - part.first_step) for part, end in zip(parts, ends, strict=True)]
        return _estimate(task, config, processes, batch, steps, named)


def estimate_generator(config: GeneratorRunConfig, processes: int = 1) -> Estimate:
    """Estimate the training of a generator on cached latents; arguments and result as for `estimate_tokenizer`."""
    model = config.model
    with torch.device("meta"):
        task = GeneratorTask(LatentGenerator(model), seed=0)
    with _shapes_only(task):

        def batch(count: int) -> LatentBatch:
            labels, positions = torch.zeros(count, dtype=torch.int64), torch.arange(count)
            latents = torch.zeros(count, model.num_tokens, model.latent_dim)
            return LatentBatch(latents=latents, labels=labels, positions=positions)

        return _estimate(task, config, processes, batch, [0], [(model.process.kind, config.train.steps)])


def _estimate(
    task: Task,
    config: TokenizerRunConfig | GeneratorRunConfig,
    processes: int,
    batch: Callable[[int], Any],
    steps: list[int],
    named: list[tuple[str, int]],
) -> Estimate:
    train = config.train
    low = compute_dtype(_on_gpu(train.precision), torch.device("cpu"))
    if train.activation_checkpointing:
        recompute_activations(task.model)
    task.train()

    def update(count: int, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
            loss, _, made = task(batch(count), step, task.scheduled(step))
        loss.backward()
        if task.critic is not None and task.critic_counts(step):
            with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
                loss, _ = task.critic(*made)
            loss.backward()

    for module in (task, task.critic):  # gradients that are there already are no part of what an update adds
        for parameter in module.parameters() if module is not None else ():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    counted = []
    for (name, length), step in zip(named, steps, strict=True):
        with sdpa_kernel(SDPBackend.MATH), _Meter() as meter:  # the others are not counted on a CPU
            update(COUNTED, step)
        counted.append(PhaseEstimate(name=name, steps=length, flops=meter.flops // COUNTED))
    with _Meter() as meter:
        update(HELD, steps[-1])
    here = train.batch_size / train.accumulate / processes
    share = processes if train.shard == "fsdp" else 1
    critic = 0 if task.critic is None else _trained(task.critic)
    trained, averages = _trained(task.model), 1 + len(train.more_ema_decays) + len(train.ema_lengths)
    by_muon = _by_muon(task.model) if config.optim.kind == "muon" else 0
    still = _frozen(task)
    frozen = sum(p.numel() * p.element_size() for p in still)
    return Estimate(
        trained=trained + critic,
        frozen=sum(p.numel() for p in still),
        batch_size=train.batch_size,
        phases=tuple(counted),
        weights=FLOAT * (trained // share + critic) + frozen,
        gradients=FLOAT * (trained // share + critic),
        optimizer=FLOAT * ((2 * trained - by_muon) // share + 2 * critic),
        averages=FLOAT * averages * trained // share,
        activations=round(meter.most / HELD * here),
    )


def untrained_task(config: TokenizerRunConfig) -> TokenizerTask:
    """Return the task of a recipe with all its networks at random, which needs no weights: for looking at its cost."""
    loss, size, cpu = config.loss, config.model.image_size, torch.device("cpu")
    teacher, adversary = None, None
    if loss.alignment is not None:
        dtype = compute_dtype(_on_gpu(loss.alignment.precision), cpu)
        teacher = load_backbone(loss.alignment.teacher, image_size=size, pretrained=False, dtype=dtype)
    if loss.adversarial is not None:
        network: Any = loss.adversarial.discriminator
        if hasattr(network, "pretrained"):
            network = dataclasses.replace(network, pretrained=False, weights=None)
        dtype = compute_dtype(_on_gpu(config.train.precision), cpu)
        with cpu:  # it is small, and computes something when it is made
            adversary = Adversary(
                dataclasses.replace(loss.adversarial, discriminator=network), image_size=size, dtype=dtype
            )
    tokenizer = ImageTokenizer(config.model)
    if config.decoder_only:
        tokenizer.freeze_encoder()
    perceptual = PerceptualDistance(seed=None) if loss.perceptual_weight > 0 else None
    networks = {"perceptual": perceptual, "teacher": teacher, "adversary": adversary}
    return TokenizerTask(tokenizer, loss, corruption=config.corruption, **networks)


def _on_gpu(precision: Any) -> Any:
    return "bf16" if precision == "auto" else precision


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _frozen(task: Task) -> list[Tensor]:
    parts = [part for module in (task, task.critic) if module is not None for part in module.modules()]
    hidden = [part.network for part in parts if isinstance(part, FrozenBackbone)]
    every = [p for module in (task, task.critic, *hidden) if module is not None for p in module.parameters()]
    return list({id(p): p for p in every if not p.requires_grad}.values())


def _by_muon(model: nn.Module) -> int:
    decayed, _ = parameter_groups(model)
    return sum(p.numel() for name, p in decayed.items() if "blocks." in name and p.ndim == 2)


@contextlib.contextmanager
def _shapes_only(task: Task) -> Iterator[None]:
    """Let tensors have shapes only, but pass for ones on the CPU; those of the task are on the meta device before."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (task, task.critic):
            if module is not None:
                _without_numbers(module)
        yield


def _without_numbers(module: nn.Module) -> None:
    for part in module.modules():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(part, kind).items():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device="cpu")
                    own = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    getattr(part, kind)[name] = own
        if isinstance(part, FrozenBackbone):
            _without_numbers(part.network)


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of all tensors that are made within it until they are let go.

    Torch's own counter follows modules by hooks, which do not bear a gradient that is asked for within a forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in self._known and storage._cdata not in given:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._let_go, storage.nbytes())
        return made

    def _let_go(self, size: int) -> None:
        self.now -= size
