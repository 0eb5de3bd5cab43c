"""The page of `softvq evaluate probe`."""

import numpy as np
import torch
from torch import Tensor

from softvq.evaluation.probe_page import MOST_NAMES, Probed, confusion_picture, probe_page
from softvq.evaluation.probing import ProbeResult, Score
from tests.test_page import Page

NAMES = ["ant", "bee", "<b>fly</b>"]


def probed(model: str, confusion: Tensor) -> Probed:
    total = int(confusion.sum())
    right = Score(correct=int(confusion.diag().sum()), total=total)
    few = Score(correct=1, total=total)
    result = ProbeResult(
        linear=right, knn=few, majority=few, l2=0.01, sweep={0.001: 0.25, 0.01: 0.75}, gradient=0.0, neighbours=3,
        confusion=confusion,
    )  # fmt: skip
    return Probed(model=model, on="encoder", result=result, learned=40)


def test_figures_and_mistakes_are_on_the_page() -> None:
    confusion = torch.tensor([[5, 0, 1], [2, 3, 0], [0, 0, 4]])
    text = probe_page([probed("mine", confusion)], NAMES, {"Machine": "this <one>"})
    page = Page(text)
    words = page.words()
    assert "80.0 %" in words
    assert "12 of 15" in words
    assert words.index("bee for ant") < words.index("ant for <b>fly</b>") < words.index("How strong a penalty")
    assert "2 of 5" in words
    assert "bee for <b>fly</b>" not in words
    assert "0.7500, chosen" in words
    assert "this <one>" in words
    assert "<b>" not in text
    assert len(page.pictures) == 3


def test_several_models_have_bars_of_their_own() -> None:
    confusion = torch.tensor([[5, 0, 1], [2, 3, 0], [0, 0, 4]])
    worse = torch.tensor([[1, 4, 1], [2, 3, 0], [0, 4, 0]])
    page = Page(probe_page([probed("worse", worse), probed("mine", confusion)], NAMES, {}))
    words = page.words()
    assert len(page.pictures) == 5
    assert "80.0 %" in words  # the better one is in the summary
    assert "26.7 %" not in words
    for row in ("1: worse", "2: mine", "What worse is taken for", "ant for bee", "4 of 15"):
        assert row in words


def test_the_matrix_shows_shares_of_each_row() -> None:
    confusion = torch.zeros(MOST_NAMES + 1, MOST_NAMES + 1, dtype=torch.int64)  # too many for names
    confusion[0, 1], confusion[0, 0], confusion[2, 2] = 1, 3, 7
    pixels = np.array(confusion_picture(confusion, [str(i) for i in range(MOST_NAMES + 1)]))
    side = len(pixels) // (MOST_NAMES + 1)
    always, white = np.array([193, 18, 31]), np.array([255, 255, 255])
    assert (pixels[2 * side, 2 * side] == always).all()
    assert (pixels[5 * side, 5 * side] == white).all()  # a class without photographs
    for column, share in ((0, 0.75), (1, 0.25)):
        assert np.abs(pixels[0, column * side] - (white + share * (always - white))).max() <= 1


def test_names_stand_beside_a_small_matrix() -> None:
    confusion = torch.eye(3, dtype=torch.int64)
    plain = confusion_picture(confusion, ["", "", ""])
    named = confusion_picture(confusion, ["a", "b", "a very long name of a class that would leave no room at all"])
    assert named.width > plain.width
    assert named.size[0] == named.size[1] < 640 + 200
    edge = named.width - 640 // 3 * 3 - 1
    pixels = np.array(named)
    assert (pixels[:, :edge] < 128).any()  # ink to the left, for rows
    assert (pixels[:edge] < 128).any()  # and above, for columns
    assert (pixels[edge + 10, edge + 10] == [193, 18, 31]).all()
