"""The released generators load by their own names and compute what the released code computed, samplers included.

The arrays in `tests/parity/` were made by the released code with weights that follow from their names (`fill.py`).
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq.errors import InputError
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow, FlowConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.guidance import Guidance, guided
from softvq.generators.sampling import SAMPLERS, times_for
from tests.parity import fill

PARITY = Path(__file__).parent / "parity"
SHAPE = (2, 32, 32)
LABELS = torch.tensor([3, 977])


def description_of(case):
    return json.loads((PARITY / f"{case}.json").read_text())


def noise(seed):
    return torch.from_numpy(fill.noise(SHAPE, seed))


def released_folder(case, folder, prefix="", **changes):
    """Write the case as a released repository would hold it."""
    description = description_of(case)
    state = {
        prefix + name: torch.from_numpy(fill.fill(name, tuple(shape)))
        for name, shape in description["state_dict"].items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**description["config"], **changes}))
    return folder


@pytest.fixture(scope="module")
def sit(tmp_path_factory):
    return LatentGenerator.from_pretrained(released_folder("sit_tiny_1d", tmp_path_factory.mktemp("sit")))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return LatentGenerator.from_pretrained(released_folder("dit_tiny_1d", tmp_path_factory.mktemp("dit")))


def assert_matches(found, expected):
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-4 * largest)


def sampled(generator, process, sampler, steps, guidance, draw):
    def network(noisy, time, null):
        labels = LABELS.repeat(len(noisy) // len(LABELS))
        return generator.network(noisy, process.network_time(time), labels, null)

    predict = guided(network, process, guidance)
    return SAMPLERS[sampler](predict, noise(7), times_for(sampler, process, steps), process, draw)


@torch.no_grad()
def test_the_velocity_is_that_of_the_released_code(sit):
    expected = load_file(PARITY / "sit_tiny_1d.safetensors")["v"]
    times = torch.tensor(description_of("sit_tiny_1d")["inputs"]["t"])
    found = sit.network(noise(7), times, torch.tensor([3, 0]), torch.tensor([False, True]))
    assert_matches(found, expected)


@pytest.mark.parametrize(
    ("name", "sampler", "path", "scale"),
    [
        ("euler_nocfg", "euler", "linear", 1.0),
        ("euler_cfg", "euler", "linear", 2.0),
        ("heun_cfg", "heun", "linear", 2.0),
        ("euler_maruyama_linear_cfg", "euler_maruyama", "linear", 2.0),
        ("euler_maruyama_cosine_cfg", "euler_maruyama", "cosine", 2.0),
    ],
)
@torch.no_grad()
def test_flow_samplers_are_those_of_the_released_code(name, sampler, path, scale, sit):
    description = description_of("sit_tiny_1d")
    guidance = Guidance(scale=scale, interval=tuple(description["inputs"]["guidance_interval"]))
    process = Flow(FlowConfig(path=path))
    found = sampled(sit, process, sampler, description["steps"], guidance, lambda step: noise(1000 + step))
    assert_matches(found, load_file(PARITY / "sit_tiny_1d.safetensors")[name])


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_score_is_that_of_the_released_code(path):
    expected = load_file(PARITY / "sit_tiny_1d.safetensors")[f"score_{path}"]
    flow, times = Flow(FlowConfig(path=path)), description_of("sit_tiny_1d")["inputs"]["t"]
    for place, time in enumerate(times):
        part = slice(place, place + 1)
        prediction = flow.predict(noise(8)[part], noise(7)[part], time)
        torch.testing.assert_close(
            flow.score(prediction, time), expected[part], rtol=0, atol=1e-4 * float(expected.abs().max())
        )


@torch.no_grad()
def test_noise_and_variance_are_those_of_the_released_code(dit):
    expected = load_file(PARITY / "dit_tiny_1d.safetensors")["eps_sigma"]
    found = dit.network(noise(7), torch.tensor([11.0, 900.0]), torch.tensor([3, 0]), torch.tensor([False, True]))
    assert_matches(found, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@torch.no_grad()
def test_diffusion_samplers_are_those_of_the_released_code(sampler, schedule, dit):
    def draw(step):  # the released sampler draws for both halves of its doubled batch and keeps the first
        return torch.from_numpy(fill.noise((4, *SHAPE[1:]), 1000 + step))[:2]

    process = Diffusion(DiffusionConfig(schedule=schedule))
    found = sampled(dit, process, sampler, 10, Guidance(scale=1.5), draw)
    assert_matches(found, load_file(PARITY / "dit_tiny_1d.safetensors")[f"{sampler}10_{schedule}_cfg"])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_respaced_betas_are_those_of_the_released_code(schedule):
    expected = load_file(PARITY / "dit_tiny_1d.safetensors")[f"betas_{schedule}_sum"]
    process = Diffusion(DiffusionConfig(schedule=schedule))
    alphas = [process.levels(time)[0] for time in process.grid(10)]
    betas = [1 - (alpha / after) ** 2 for alpha, after in pairwise(alphas)]
    assert sum(betas) == pytest.approx(float(expected), rel=1e-9)


def test_kinds_are_told_by_their_tensors(sit, dit):
    assert (sit.config.process.kind, dit.config.process.kind) == ("flow", "diffusion")
    assert (sit.sampling.guidance.scale, dit.sampling.sampler) == (1.75, "ddpm")


def test_wrapped_names_are_read(tmp_path, sit):
    wrapped = LatentGenerator.from_pretrained(released_folder("sit_tiny_1d", tmp_path, prefix="module._orig_mod."))
    assert wrapped.fingerprint() == sit.fingerprint()


def test_a_repository_names_its_tokenizer(tmp_path, monkeypatch):
    from softvq import hub

    folder = released_folder("sit_tiny_1d", tmp_path)
    monkeypatch.setattr(hub, "_download", lambda name, revision: folder)
    generator = LatentGenerator.from_pretrained("SoftVQVAE/sit-xl_softvq-bl-64")
    assert generator.tokenizer.name == "SoftVQVAE/softvq-bl-64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, "patch_size is 2, expected 1"),
        ({"vae_1d": False}, "vae_1d is False, expected True"),
        ({"depth": "2"}, "depth is '2', expected a whole number"),
        ({"depth": 3}, "tensors missing"),
    ],
)
def test_released_folders_that_cannot_be_are_named(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        LatentGenerator.from_pretrained(released_folder("sit_tiny_1d", tmp_path, **changes))


def test_a_foreign_tensor_is_named(tmp_path):
    folder = released_folder("sit_tiny_1d", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "text_encoder.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"hold 'text_encoder.weight', which no released generator has"):
        LatentGenerator.from_pretrained(folder)
