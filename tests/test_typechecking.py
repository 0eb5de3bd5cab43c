"""Signatures are checked while tests run, and what contradicts one is found wherever it stands."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from softvq.randomness import keys_of, uniform
from softvq.tokenizers.config import TokenizerConfig
from tests.program import MODEL
from tests.typechecking import checked


@jaxtyped(typechecker=checked)
def cut(x: Float[Tensor, "batch dim"], y: Float[Tensor, " dim"], count: int, *, name: str = "") -> Float[Tensor, "dim"]:
    return name or (x.mean(0) + y)[:count]


def test_arguments_are_checked_with_each_other_and_the_result_with_them() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(3)
    for _ in range(2):  # the first call is the one that compiles
        assert torch.equal(cut(x, y, 3), y)
        for wrong in ((x, y, 2.0), (x, y[:2], 3), (x[0], y, 3), (x.int(), y, 3)):
            with pytest.raises(TypeCheckError, match="parameters of"):
                cut(*wrong)
        for wrong in ({"count": 2}, {"count": 3, "name": "a string"}):
            with pytest.raises(TypeCheckError, match="return value of"):
                cut(x, y, **wrong)


def test_everything_of_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError, match=r"parameters of softvq\.randomness\.uniform"):
        uniform(torch.zeros(2), 3)
    with pytest.raises(TypeCheckError, match=r"parameters of softvq\.randomness\.keys_of"):
        keys_of("0", "name", torch.arange(2))
    with pytest.raises(TypeCheckError, match="TokenizerConfig"):
        TokenizerConfig(encoder=MODEL.encoder, decoder=MODEL.decoder, num_latent_tokens="4", latent_dim=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softvq.randomness._unit", lambda bits: bits)
        with pytest.raises(TypeCheckError, match=r"return value of softvq\.randomness\.uniform"):
            uniform(torch.arange(2), 3)
