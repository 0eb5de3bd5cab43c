import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.evaluation.metrics import mean_colour_psnr, psnr, ssim
from softvq.evaluation.page import Reconstruction, measure, reconstruction_page
from softvq.evaluation.pictures import as_images, as_tensor
from softvq.randomness import generator

VOID = {"img", "meta"}
FACTS = {"Model": "runs/demo", "Versions": "softvq 0.1.0", "Command": "softvq reconstruct photos out"}


class Page(HTMLParser):
    """What a browser would see: balanced tags, text, pictures."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.pictures, self.text = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


def batch(number, size=24, seed=0):
    return torch.rand(number, 3, size, size, generator=generator(seed, "test")) * 2 - 1


def item(**changes):
    picture = as_images(batch(1))[0]
    fields = {"name": "hat.jpg", "original": picture, "reconstruction": picture, "psnr": 21.34, "ssim": 0.6543}
    return Reconstruction(**(fields | {"mean_colour_psnr": 12.0, "num_latent_tokens": 8, "latent_dim": 9} | changes))


def decoded(picture):
    header, data = picture["src"].split(",", 1)
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert header == f"data:image/{image.format.lower()};base64"
    return image


def test_measure_has_the_figures_of_the_metrics():
    originals, reconstructions = batch(3), batch(3, seed=1) * 1.5
    found = measure(originals, reconstructions, ["a", "b", "c"], 64, 32, ["", "by B", ""])
    assert [entry.psnr for entry in found] == psnr(reconstructions, originals).tolist()
    assert [entry.ssim for entry in found] == ssim(reconstructions, originals).tolist()
    assert [entry.mean_colour_psnr for entry in found] == mean_colour_psnr(originals).tolist()
    assert [(entry.name, entry.credit) for entry in found] == [("a", ""), ("b", "by B"), ("c", "")]
    assert torch.equal(as_tensor([found[2].original]), as_tensor(as_images(originals))[2:])
    assert found[0].compression_ratio == 24 * 24 * 3 / (64 * 32 * 2)


def test_measure_wants_a_name_for_each():
    with pytest.raises(ValueError, match="zip"):
        measure(batch(2), batch(2), ["a"], 64, 32)


def test_every_photograph_is_there_with_its_figures_and_both_pictures():
    originals, reconstructions = batch(2), batch(2, seed=1)
    page = Page(reconstruction_page("Held-out", measure(originals, reconstructions, ["a.jpg", "b.jpg"], 16, 8), FACTS))
    assert [picture["alt"] for picture in page.pictures] == [
        "a.jpg, the original photograph",
        "a.jpg, reconstructed from 16 tokens",
        "b.jpg, the original photograph",
        "b.jpg, reconstructed from 16 tokens",
    ]
    for picture, tensor in zip(page.pictures, [originals[0], reconstructions[0], originals[1]], strict=False):
        assert np.array_equal(np.asarray(decoded(picture)), np.asarray(as_images(tensor[None])[0]))
        assert (picture["width"], picture["height"]) == ("24", "24")
    for decibels, similarity in zip(psnr(reconstructions, originals), ssim(reconstructions, originals), strict=True):
        assert f"PSNR {decibels:.1f} dB" in page.words()
        assert f"SSIM {similarity:.3f}" in page.words()
    assert "tokens 16 × 8 compression 6.8 : 1" in page.words()


def test_the_summary_is_the_mean():
    entries = [item(psnr=20.0, ssim=0.5), item(psnr=30.0, ssim=0.7, mean_colour_psnr=16.0)]
    words = Page(reconstruction_page("Demo", entries, {})).words()
    for expected in (
        "Photographs 2 24 × 24 pixels",
        "Mean PSNR 25.0 dB +11.0 dB over mean colours",
        "Mean SSIM 0.600",
        "Tokens 8 144 bytes in float16",
        "Compression 12.0 : 1",
    ):
        assert expected in words


def test_the_summary_of_different_photographs_gives_ranges():
    entries = [item(), item(num_latent_tokens=32, original=Image.new("RGB", (48, 24)))]
    words = Page(reconstruction_page("Demo", entries, {})).words()
    assert "of several sizes" in words
    assert "Tokens 8 to 32 144 to 576 bytes in float16" in words
    assert "Compression 6.0 to 12.0 : 1" in words


def test_perfect_and_flat_pictures_have_no_strange_numbers():
    words = Page(reconstruction_page("Demo", [item(psnr=float("inf"), mean_colour_psnr=float("inf"))], {})).words()
    assert "PSNR infinite mean colour infinite" in words
    assert not re.search(r"\b(nan|inf)\b", words)


def test_facts_stand_in_their_order_and_may_be_absent():
    page = Page(reconstruction_page("Demo", [item()], FACTS))
    assert " ".join(f"{key} {value}" for key, value in FACTS.items()) in page.words()
    assert "table" not in {tag for tag, _ in Page(reconstruction_page("Demo", [item()], {})).tags}


def test_all_text_is_escaped():
    hostile = "\"'><script>alert(1)</script>&amp;$title"
    source = reconstruction_page(hostile, [item(name=hostile, credit=hostile)], {hostile: hostile})
    page = Page(source)
    plain = Page(reconstruction_page("t", [item(name="n", credit="c")], {"k": "v"}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in page.tags] == [sorted(attributes) for _, attributes in plain.tags]
    assert page.words().count(hostile) == 6  # title, heading, name, credit, fact and its value
    assert page.pictures[0]["alt"] == f"{hostile}, the original photograph"


def test_a_file_name_that_is_no_text_can_be_written():
    reconstruction_page("Demo", [item(name="photo\udcff.jpg")], {}).encode()


def test_nothing_is_fetched_and_nothing_runs():
    page = Page(reconstruction_page("Demo", [item()], FACTS))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "style"} & attributes.keys()
        assert attributes.get("src", "data:image/").startswith("data:image/")
    source = reconstruction_page("Demo", [item()], FACTS)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]+", "", source))
    assert "default-src 'none'" in next(a["content"] for _, a in page.tags if "http-equiv" in a)


def test_the_page_is_fit_for_screen_readers_and_both_schemes():
    source = reconstruction_page("Demo & co", [item()], FACTS)
    page = Page(source)
    assert page.tags[0] == ("html", {"lang": "en"})
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert set(headings[1:]) == {2}
    assert source.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in source
    assert "<title>Demo &amp; co</title>" in source


def test_large_pictures_are_shrunk_and_small_ones_keep_their_pixels():
    large, small = Image.new("RGB", (2400, 1200), "red"), Image.new("RGB", (64, 64))
    page = Page(reconstruction_page("Demo", [item(original=large, reconstruction=small)], {}))
    shrunk, kept = map(decoded, page.pictures)
    assert (shrunk.size, shrunk.format) == ((1024, 512), "JPEG")
    assert (kept.size, kept.format) == ((64, 64), "PNG")
    assert (page.pictures[0]["width"], page.pictures[0]["height"]) == ("2400", "1200")
    assert large.size == (2400, 1200), "the caller's picture was changed"
    assert [picture.get("class") for picture in page.pictures] == [None, "pixels"]
