import numpy as np
import pytest
import torch
from PIL import Image

from softvq.evaluation.pictures import GAP_PX, LINE_PX, MARGIN_PX, as_images, as_tensor, grid, side_by_side

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def flat(colour, size=(120, 100)):
    return Image.new("RGB", size, colour)


def pixels(image, left, top, width, height):
    return np.asarray(image.crop((left, top, left + width, top + height)))


def is_flat(image, colour, left, top, width, height):
    return bool((pixels(image, left, top, width, height) == colour).all())


def test_a_pair_stands_side_by_side_in_its_margins():
    sheet = side_by_side([flat(RED)], [flat(BLUE)], ["a.jpg"])
    assert sheet.size == (2 * 120 + GAP_PX + 2 * MARGIN_PX, 100 + 2 * LINE_PX + 2 * MARGIN_PX)
    top = MARGIN_PX + LINE_PX
    assert is_flat(sheet, RED, MARGIN_PX, top, 120, 100)
    assert is_flat(sheet, WHITE, MARGIN_PX + 120, top, GAP_PX, 100)
    assert is_flat(sheet, BLUE, MARGIN_PX + 120 + GAP_PX, top, 120, 100)
    assert is_flat(sheet, WHITE, 0, 0, sheet.width, MARGIN_PX)
    assert not is_flat(sheet, WHITE, MARGIN_PX, MARGIN_PX, 120, LINE_PX), "the caption is missing"
    for left in (MARGIN_PX, MARGIN_PX + 120 + GAP_PX):
        assert not is_flat(sheet, WHITE, left, top + 100, 120, LINE_PX), "a label is missing"


def test_without_captions_there_is_no_line_for_them():
    assert side_by_side([flat(RED)], [flat(BLUE)]).height == 100 + LINE_PX + 2 * MARGIN_PX


def test_a_long_caption_is_cut_short_inside_its_pair():
    pairs = [flat(RED)] * 2, [flat(BLUE)] * 2
    sheet = side_by_side(*pairs, ["word " * 100, ""], columns=2)
    cell = 2 * 120 + GAP_PX
    assert not is_flat(sheet, WHITE, MARGIN_PX + cell - 30, MARGIN_PX, 30, LINE_PX)
    assert is_flat(sheet, WHITE, MARGIN_PX + cell, MARGIN_PX, MARGIN_PX + cell, LINE_PX)


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (2, 1), (6, 2), (8, 2), (40, 3)])
def test_the_number_of_columns_is_chosen(number, columns):
    sheet = side_by_side([flat(RED)] * number, [flat(BLUE)] * number)
    assert sheet.width == columns * (2 * 120 + GAP_PX + MARGIN_PX) + MARGIN_PX


def test_small_pictures_are_enlarged_by_a_whole_factor():
    sheet = side_by_side([flat(RED, (32, 16))], [flat(BLUE, (32, 16))])
    assert is_flat(sheet, RED, MARGIN_PX, MARGIN_PX, 96, 48)
    assert is_flat(sheet, BLUE, MARGIN_PX + 96 + GAP_PX, MARGIN_PX, 96, 48)


def test_tensors_and_images_draw_the_same():
    tensor = torch.linspace(-1.2, 1.2, 2 * 3 * 96 * 100).view(2, 3, 96, 100)
    images = as_images(tensor)
    again = as_tensor(images)
    assert (again - tensor.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert side_by_side(tensor, tensor).tobytes() == side_by_side(images, images).tobytes()
    assert grid(tensor, 2).tobytes() == grid(images, 2).tobytes()


def test_images_of_other_modes_become_rgb():
    assert [image.mode for image in as_images([Image.new("L", (3, 3)), Image.new("RGBA", (3, 3))])] == ["RGB", "RGB"]


def test_a_grid_goes_left_to_right_with_rows_as_high_as_their_highest():
    sheet = grid([flat(RED), flat(BLUE, (60, 140)), flat(BLUE, (50, 40))], columns=2)
    assert sheet.size == (120 + 60 + 3 * MARGIN_PX, 140 + 40 + 3 * MARGIN_PX)
    assert is_flat(sheet, RED, MARGIN_PX, MARGIN_PX, 120, 100)
    assert is_flat(sheet, BLUE, 120 + 2 * MARGIN_PX, MARGIN_PX, 60, 140)
    assert is_flat(sheet, BLUE, MARGIN_PX, 140 + 2 * MARGIN_PX, 50, 40)
    assert is_flat(sheet, WHITE, MARGIN_PX + 50, 140 + 2 * MARGIN_PX, sheet.width - MARGIN_PX - 50, 40)


def test_fewer_pictures_than_columns_leave_no_empty_columns():
    assert grid([flat(RED)] * 2, columns=5).size == grid([flat(RED)] * 2, columns=2).size


def test_a_caption_stands_below_its_picture():
    sheet = grid([flat(RED)] * 2, 2, ["first", ""])
    assert sheet.height == 100 + LINE_PX + 2 * MARGIN_PX
    assert not is_flat(sheet, WHITE, MARGIN_PX, MARGIN_PX + 100, 120, LINE_PX)
    assert is_flat(sheet, WHITE, 120 + 2 * MARGIN_PX, MARGIN_PX + 100, 120, LINE_PX)


@pytest.mark.parametrize(
    ("caption", "same_as"), [("café", "cafe"), ("写真.jpg", "??.jpg"), ("a\n b\udcff", "a b?"), ("1 · 2", "1 · 2")]
)
def test_letters_that_the_font_lacks_are_replaced(caption, same_as):
    assert grid([flat(RED)], 1, [caption]).tobytes() == grid([flat(RED)], 1, [same_as]).tobytes()


def test_a_caption_too_many_or_none_to_draw_is_our_mistake():
    with pytest.raises(AssertionError, match="2 captions for 1 pictures"):
        grid([flat(RED)], 1, ["a", "b"])
    with pytest.raises(AssertionError, match="no pictures"):
        grid([], 3)
    with pytest.raises(AssertionError, match="2 originals and 1 reconstructions"):
        side_by_side([flat(RED)] * 2, [flat(BLUE)])
