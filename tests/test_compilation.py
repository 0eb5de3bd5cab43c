"""Compiled regions compute what the networks do without; blocks and heads are found wherever they are."""

import pytest
import torch
from timm.models.vision_transformer import Block

from softvq.losses.discriminators import TokenHead
from softvq.training.compilation import compile_regions
from softvq.training.tokenizer_recipe import build_task
from tests import family


def compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_blocks_are_compiled_alone_and_networks_without_any_whole() -> None:
    task = build_task(family.recipe(family.SOFT, every_flag=True), torch.device("cpu"))
    task.compile(backend="eager")
    networks = [task.tokenizer.encoder, task.tokenizer.decoder, task.teacher.network]
    networks += [task.critic.discriminator.backbone.network]
    for network in networks:
        blocks = [part for part in network.modules() if isinstance(part, Block)]
        assert blocks
        assert all(map(compiled, blocks))
        assert not compiled(network)
    assert all(map(compiled, task.critic.discriminator.heads))
    assert all(isinstance(head, TokenHead) for head in task.critic.discriminator.heads)
    assert compiled(task.tokenizer.quantizer)
    assert compiled(task.heads["projector"])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch looks at it itself while it traces
def test_compiled_regions_give_the_same_loss_and_gradients() -> None:
    config = family.recipe(family.SOFT)
    plain, other = (build_task(config, torch.device("cpu")) for _ in range(2))
    for part in (other.tokenizer.encoder, other.tokenizer.decoder):
        compile_regions(part, backend="eager")
    for task in (plain, other):
        task(family.pictures(config, 0), 0)[0].backward()
    for ours, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
