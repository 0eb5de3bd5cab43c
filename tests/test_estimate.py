"""softvq estimate: what shapes tell against what a real update does, and hours that follow from it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from softvq.arguments.speed import DEVICE_NAMES
from softvq.commands import estimate as command
from softvq.config import from_dict, to_dict, to_yaml
from softvq.data.latent_set import LatentBatch
from softvq.evaluation.estimate import DEVICES, Estimate, PhaseEstimate, estimate_generator, estimate_tokenizer
from softvq.training.generator_recipe import GeneratorRunConfig
from softvq.training.generator_run import build_generator
from softvq.training.generator_task import GeneratorTask
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task
from tests import family
from tests.generators import run_config
from tests.program import Program


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_every_loss_is_gone_through_without_numbers() -> None:
    config = family.recipe(family.SOFT, every_flag=True)
    adversarial = dataclasses.replace(config.loss.adversarial, consistency_weight=0.0, micro_batches=1)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, adversarial=adversarial, features=None))
    found = estimate_tokenizer(config)
    task = build_task(config, torch.device("cpu"))
    trained = [p for p in (*task.model.parameters(), *task.critic.parameters()) if p.requires_grad]
    assert found.trained == sum(p.numel() for p in trained)
    teacher = sum(p.numel() for p in task.teacher.network.parameters())
    critic = sum(p.numel() for p in task.critic.discriminator.backbone.network.parameters())
    assert found.frozen == teacher + critic
    assert [(phase.name, phase.steps) for phase in found.phases] == [
        ("pixels + alignment", 1), ("pixels + adversarial + alignment", 5),
    ]  # fmt: skip
    assert 0 < found.phases[0].flops < found.phases[1].flops


def test_operations_are_three_products_a_layer() -> None:
    config = run_config("sit", train__precision="fp32")
    generator = build_generator(config)
    tokens, width = config.model.num_tokens, config.model.network.width
    forward = 2 * 2 * 2 * tokens**2 * width  # two blocks, and in each the logits and the weighted sums
    whole = without_input_gradient = 0
    for name, layer in generator.named_modules():
        if isinstance(layer, torch.nn.Linear):
            seen = 1 if "modulation" in name or "time_embedding" in name else tokens
            whole += 2 * seen * layer.weight.numel()
            if name.endswith(("to_tokens", "time_embedding.mlp.0")):  # what they see is not trained
                without_input_gradient += 2 * seen * layer.weight.numel()
    assert estimate_generator(config).phases[0].flops == 3 * (forward + whole) - without_input_gradient


def test_activations_are_what_autograd_holds() -> None:
    config = run_config("sit", train__precision="fp32", train__batch_size=8)
    found = estimate_generator(config)
    held: dict[int, int] = {}
    task = GeneratorTask(build_generator(config), seed=0)
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept: list[torch.Tensor] = []
    shape = (8, config.model.num_tokens, config.model.latent_dim)
    batch = LatentBatch(latents=torch.zeros(shape), labels=torch.zeros(8, dtype=torch.int64), positions=torch.arange(8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or keep(t), lambda t: t):
        task(batch, 0, {})
    saved = sum(size for place, size in held.items() if place not in weights)
    assert 0.8 * saved < found.activations < 2 * saved


def test_memory_is_the_sum_of_copies_and_falls_as_the_recipe_asks() -> None:
    config = run_config("sit", optim__kind="adamw", train__batch_size=8)
    plain = estimate_generator(config)
    numbers = sum(p.numel() for p in build_generator(config).parameters())
    sizes = (plain.weights, plain.gradients, plain.optimizer, plain.averages)
    assert sizes == (4 * numbers, 4 * numbers, 8 * numbers, 4 * numbers)
    assert plain.memory == sum(sizes) + plain.activations
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, kind="muon"))
    half = estimate_generator(with_train(config, shard="fsdp", ema_lengths=(0.1,)), 2)
    assert half.optimizer < 0.9 * plain.optimizer / 2
    assert half.weights == 4 * (numbers // 2)
    assert half.averages == 8 * numbers // 2
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.01)
    again = estimate_generator(with_train(config, activation_checkpointing=True))
    assert again.activations < 0.8 * plain.activations
    assert plain.phases[0].flops < again.phases[0].flops < 4 / 3 * plain.phases[0].flops


def test_hours_are_operations_by_speed() -> None:
    phases = (PhaseEstimate(name="a", steps=10, flops=100), PhaseEstimate(name="b", steps=5, flops=400))
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "averages", "activations"), 1)
    found = Estimate(trained=1, frozen=0, batch_size=4, phases=phases, **sizes)
    assert found.seconds(1000.0, 2) == (10 * 100 + 5 * 400) * 4 / 1000 / 2
    assert found.images_per_second(phases[1], 1000.0, 2) == 5.0


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(command, "matrix_peak", lambda *_: 1e10)
    return Program(capsys)


def test_the_command_takes_recipes_of_both_kinds(program: Program, tmp_path: Path) -> None:
    assert set(DEVICE_NAMES) == set(DEVICES)
    (tmp_path / "t.yaml").write_text(to_yaml(family.recipe(family.SOFT)))
    done = program("estimate", tmp_path / "t.yaml", "--json", "--utilisation", "0.5", "train.steps=12")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    config = from_dict(TokenizerRunConfig, to_dict(with_train(family.recipe(family.SOFT), steps=12)))
    assert report["hours"] == pytest.approx(estimate_tokenizer(config).seconds(5e9, 1) / 3600)
    assert "measured" in report["machine"]
    (tmp_path / "g.yaml").write_text(to_yaml(from_dict(GeneratorRunConfig, to_dict(run_config("mar")))))
    model = run_config("mar").model
    shape = ("--tokens", model.num_tokens, "--dim", model.latent_dim, "--classes", model.num_classes)
    done = program("estimate", tmp_path / "g.yaml", *shape, "--device-name", "h100", "--processes", "2")
    assert done.code == 0, done.err
    assert "h100, published peak: 989 TFLOP/s, of which 30% are assumed to be reached; 2 processes" in done.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--utilisation", "0"), "--utilisation is 0.0, expected more than 0"),
        (("--processes", "3"), "batch_size is 8, expected a multiple of accumulate x processes (3)"),
        (("model.width=3",), "width"),
    ],
)
def test_what_cannot_be_estimated_is_told(given: tuple[str, ...], said: str, program: Program, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(to_yaml(family.recipe(family.SOFT)))
    done = program("estimate", tmp_path / "t.yaml", *given)
    assert done.code == 2
    assert said in done.err
