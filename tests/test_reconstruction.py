"""Figures about pairs of pictures, and what gathers them over batches and ranks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from softvq.commands.common import round_trip
from softvq.config import from_dict
from softvq.data.images import to_image
from softvq.errors import InputError, RunError
from softvq.evaluation.image_sets import ImageSet, in_memory, pixel_fingerprint
from softvq.evaluation.pair_figures import figure_names, load_distance, pair_figures
from softvq.evaluation.reconstruction import Meter, Reconstructions, check_pairs, names_of, rebuilt
from softvq.evaluation.reconstruction_report import (
    figures_table,
    image_row,
    latent_row,
    median_places,
    reconstruction_label,
    worst_places,
)
from softvq.files import write_tensors
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from tests.family import QUANTIZERS
from tests.program import make_model

CPU = torch.device("cpu")


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    """Draw smooth pictures with some noise."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth + 10 * torch.randn(smooth.shape, generator=random)).round().clamp(0, 255).to(torch.uint8)


def test_figures_are_those_of_scikit_image() -> None:
    a, b = noise(4, 24, 1), noise(4, 24, 2)
    found = pair_figures(a, b)
    assert list(found) == ["mse", "psnr", "mean_colour_psnr", "ssim", "legacy_ssim"] == figure_names((24, 24), None)
    for i, (x, y) in enumerate(zip(a.permute(0, 2, 3, 1).numpy(), b.permute(0, 2, 3, 1).numpy(), strict=True)):
        assert float(found["psnr"][i]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), rel=1e-12)
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert float(found["ssim"][i]) == pytest.approx(
            structural_similarity(x, y, data_range=255, channel_axis=2, **gaussian), abs=1e-5
        )
        wide = structural_similarity(x / 255, y / 255, data_range=2, channel_axis=2)
        assert float(found["legacy_ssim"][i]) == pytest.approx(wide, abs=1e-5)
        flat = np.broadcast_to(x.mean((0, 1)), x.shape)
        known = peak_signal_noise_ratio(x.astype(np.float64), flat, data_range=255)
        assert float(found["mean_colour_psnr"][i]) == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize("error", [1, 5, 255])
def test_a_constant_error_has_a_psnr_known_beforehand(error: int) -> None:
    black = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    found = pair_figures(black, black + error)
    assert found["mse"].tolist() == [error**2] * 2
    assert found["psnr"].tolist() == pytest.approx([20 * math.log10(255 / error)] * 2, rel=1e-14)
    assert pair_figures(black + error, black)["mse"].tolist() == [error**2] * 2  # bytes would wrap around
    one = black.clone()
    one[:, 1, 2, 3] = 1
    assert torch.equal(pair_figures(black, black)["psnr"], pair_figures(black, one)["psnr"])
    assert pair_figures(black, black)["psnr"].tolist() == pytest.approx([10 * math.log10(255**2 * 3 * 8 * 12)] * 2)


def test_small_pictures_have_fewer_figures() -> None:
    always = ["mse", "psnr", "mean_colour_psnr"]
    sides = {6: [], 7: ["legacy_ssim"], 11: ["ssim", "legacy_ssim"], 176: ["ssim", "ms_ssim", "legacy_ssim"]}
    for side, more in sides.items():
        assert figure_names((side, 200), None) == always + more
        pictures = noise(1, side)
        found = pair_figures(pictures, pictures)
        assert sorted(found) == sorted(always + more)
        assert all(float(found[name]) == pytest.approx(1) for name in more)


def test_a_trunk_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise OSError("no way\nto the network")

    monkeypatch.setattr(torchvision.models, "alexnet", fail)
    with pytest.raises(InputError, match=r"lpips-alex, but torchvision's alexnet .*\(no way to the network\)"):
        load_distance("lpips-alex", (64, 64))


def test_st_lpips_comes_from_a_file(tmp_path: Path) -> None:
    network = PerceptualDistance(seed=3)
    write_tensors(tmp_path / "w.safetensors", network.state_dict())
    distance = load_distance(f"st-lpips={tmp_path / 'w.safetensors'}", (20, 20))
    assert distance is not None
    assert distance.key == "st_lpips"
    a, b = noise(2, 20, 1), noise(2, 20, 2)
    expected = network(b.float() / 127.5 - 1, a.float() / 127.5 - 1)
    torch.testing.assert_close(pair_figures(a, b, distance)["st_lpips"], expected.double())
    other = PerceptualDistance(seed=4)
    write_tensors(tmp_path / "v.safetensors", other.state_dict())
    again = load_distance(f"st-lpips={tmp_path / 'v.safetensors'}", (20, 20))
    assert again is not None
    assert again.sha256 != distance.sha256


@pytest.mark.parametrize(
    ("text", "size", "names"),
    [
        ("lpips", 64, "'lpips', expected auto, none"),
        ("auto", 64, "'auto', expected"),
        ("none=x", 64, "'none=x', expected"),
        ("lpips-vgg=x", 64, "'lpips-vgg=x', expected"),
        ("st-lpips=", 64, "after the ="),
        ("st-lpips=nowhere.safetensors", 64, "nowhere.safetensors: no such file"),
        ("st-lpips", 17, "17x17 px, expected at least 18 px a side"),
        ("lpips-alex", 30, "at least 31 px a side"),
    ],
)
def test_distances_that_do_not_exist(text: str, size: int, names: str) -> None:
    with pytest.raises(InputError, match=names):
        load_distance(text, (size, size))


def test_no_distance() -> None:
    assert load_distance("none", (4, 4)) is None


def test_what_comes_back_is_what_is_saved(tmp_path: Path) -> None:
    tokenizer, pixels = make_model(tmp_path), noise(5, 32)
    found = rebuilt(tokenizer, pixels)
    images = round_trip(tokenizer, pixels.float() / 127.5 - 1, "float32")
    for pixels_back, image in zip(found.pixels, images, strict=True):
        assert np.array_equal(pixels_back.permute(1, 2, 0).numpy(), np.asarray(to_image(image)))
    assert not torch.equal(rebuilt(tokenizer, pixels, precision="bf16").pixels, found.pixels)
    with torch.no_grad():
        tokenizer.from_latents.bias.fill_(math.nan)
    with pytest.raises(RunError, match="not finite"):
        rebuilt(tokenizer, pixels)


def _tokenizer(kind: str) -> ImageTokenizer:
    vit = {"width": 16, "depth": 1, "num_heads": 2}
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        data = {"encoder": vit, "decoder": vit, "quantizer": QUANTIZERS[kind], **sizes}
        return ImageTokenizer(from_dict(TokenizerConfig, data)).eval()


def measured(tokenizer: ImageTokenizer, data: ImageSet, batch_size: int) -> Meter:
    pairs = Reconstructions(
        data=data, made=None, rebuild=lambda pixels: rebuilt(tokenizer, pixels), source="model", device=CPU,
        batch_size=batch_size, workers=0,
    )  # fmt: skip
    meter = Meter(data.count, figure_names(data.size, None))
    for batch in pairs.measured(meter).batches(3):
        meter.add_digests("made", batch.places, batch.digests)
    return meter


@pytest.mark.parametrize("kind", ["softvq", "vq", "residual-product", "kl"])
def test_codebooks_are_counted_over_all_images(kind: str) -> None:
    tokenizer, pixels = _tokenizer(kind), noise(13, 32, 4)
    meter = measured(tokenizer, in_memory(pixels, "memory"), 5)
    row = latent_row(tokenizer, (32, 32), meter.averages)
    figures = row["figures"]
    assert figures["bits_per_pixel"] == 4 * 8 * 16 / 32**2
    assert figures["compression_ratio"] == 3 * 32**2 / (4 * 8 * 2)
    assert set(row["labels"]) == set(figures)
    if kind == "kl":
        assert list(figures) == ["bits_per_pixel", "compression_ratio"]
        return
    stages = {"residual-product": 4}.get(kind, 1)
    assert figures["code_bits_per_pixel"] == 4 * stages * math.log2(16) / 32**2
    images = pixels.float() / 127.5 - 1
    indices = tokenizer.encode_indices(images).reshape(13, 4, -1)  # image, token, stage
    books = 2
    used = {
        (stage, token * books // 4, code)
        for image in indices.tolist()
        for token, codes in enumerate(image)
        for stage, code in enumerate(codes)
    }
    assert figures["codewords"] == stages * books * 16
    assert figures["dead_codewords"] == figures["codewords"] - len(used)
    assert figures["codebook_usage"] == pytest.approx(len(used) / figures["codewords"])
    with torch.no_grad():
        whole = tokenizer.quantizer.statistics(tokenizer.encode_pre(images))
    for name, key in (("perplexity", "codebook_perplexity"), ("posterior_entropy", "posterior_entropy")):
        assert figures[key] == pytest.approx(float(whole[name]), rel=1e-5)


def test_nothing_depends_on_the_batch(tmp_path: Path) -> None:
    tokenizer, pixels = make_model(tmp_path), noise(11, 32, 3)
    data = in_memory(pixels, "memory")
    known = pair_figures(pixels, rebuilt(tokenizer, pixels).pixels)
    prints = set()
    for batch_size in (1, 4, 11):
        meter = measured(tokenizer, data, batch_size)
        for name, column in zip(meter.names, meter.table.T, strict=True):
            torch.testing.assert_close(column, known[name], rtol=1e-5, atol=1e-5)
        prints.add((meter.fingerprint("data"), meter.fingerprint("made")))
    digests = [digest for batch in data.batches(4) for digest in batch.digests]
    made = in_memory(rebuilt(tokenizer, pixels).pixels, "made")
    others = [digest for batch in made.batches(4) for digest in batch.digests]
    assert prints == {(pixel_fingerprint(digests), pixel_fingerprint(others))}


def test_finished_reconstructions_are_taken_in_order() -> None:
    photos, made = noise(6, 12, 1), noise(6, 12, 2)
    data, other = in_memory(photos, "a"), in_memory(made, "b")
    pairs = Reconstructions(data=data, made=other, rebuild=None, source="b", device=CPU, batch_size=4, workers=2)
    meter = Meter(6, figure_names(data.size, None))
    read = torch.cat([batch.pixels for batch in pairs.measured(meter).batches(5)])
    assert torch.equal(read, made)
    torch.testing.assert_close(meter.table[:, 1], pair_figures(photos, made)["psnr"], rtol=0, atol=0)
    pictures = pairs.pictures([4, 1, 4])
    assert list(pictures) == [1, 4]
    for place, both in pictures.items():
        for found, pixels in zip(both, (photos, made), strict=True):
            assert np.array_equal(np.asarray(found), pixels[place].permute(1, 2, 0).numpy())


def test_pairs_that_do_not_belong_together() -> None:
    data = in_memory(noise(2, 12), "photos", ["a/x.JPEG", "b.webp"])
    assert names_of(data) == ["a/x.JPEG", "b.webp"]
    assert names_of(in_memory(noise(2, 12), "photos")) == ["000000", "000001"]
    for names in (None, ["a/x.png", "b.png"], ["a/x.JPEG.png", "b.webp.png"], ["a/x.JPEG", "b.webp"]):
        warning = check_pairs(data, in_memory(noise(2, 12), "made", names))
        assert (warning is None) == (names is not None)
    unsure = "has no names of images: pairs are made in the order in which they lie"
    nameless = in_memory(noise(2, 12), "photos")
    assert check_pairs(data, in_memory(noise(2, 12), "made")) == f"made or photos {unsure}"
    assert check_pairs(nameless, in_memory(noise(2, 12), "made", ["a.png", "b.png"])) == f"made or photos {unsure}"
    for size, names, sentence in (
        (12, ["a/x.png", "c.png"], r"made: has 'c.png' where photos has 'b.webp'"),
        (12, ["x.png", "b.png"], r"made: has 'x.png' where photos has 'a/x.JPEG'"),
        (16, None, "made: is 16x16 .* photos is 12x12"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_pairs(data, in_memory(noise(2, size), "made", names))
    with pytest.raises(InputError, match="made: holds 3 images, but photos has 2"):
        check_pairs(data, in_memory(noise(3, 12), "made"))


def test_means_have_intervals_where_there_are_images_enough() -> None:
    names = ["mse", "psnr", "mean_colour_psnr"]
    values = np.array([[4.0, 20.0, 10.0], [2.0, 24.0, math.inf], [0.0, 83.0, 12.0], [6.0, 19.0, 14.0]])
    table = torch.tensor(values, dtype=torch.float64)
    row = image_row(names, table.repeat(8, 1)[:30])
    of_30 = np.tile(values, (8, 1))[:30, 1]
    half = 1.959964 * of_30.std(ddof=1) / math.sqrt(30)
    assert row["intervals_95"]["psnr"] == pytest.approx([of_30.mean() - half, of_30.mean() + half], rel=1e-6)
    assert set(row["intervals_95"]) == {"psnr"}  # of the other too few are finite
    assert image_row(names, table.repeat(8, 1)[:29])["intervals_95"] == {}
    row = image_row(names, table)
    assert row["intervals_95"] == {}
    assert row["figures"]["psnr"] == pytest.approx(values[:, 1].mean())
    assert row["figures"]["mean_colour_psnr"] == pytest.approx(12)
    assert row["figures"]["psnr_of_mean_error"] == pytest.approx(10 * math.log10(255**2 / 3))
    few, warning = row["warnings"]
    assert few.startswith("4 images are too few for intervals")
    assert warning.startswith("1 of 4 reconstructions equal their photographs; their PSNR is that of a difference by")
    assert warning.endswith(" by one level in one value")
    assert set(row["labels"]) == set(row["figures"])


def test_a_figure_that_is_no_number_is_told_with_its_image() -> None:
    meter = Meter(3, ["mse", "st_lpips"])
    figures = {"mse": torch.zeros(3).double(), "st_lpips": torch.tensor([0.1, math.nan, 0.2]).double()}
    meter.add(torch.arange(3), figures)
    with pytest.raises(RunError, match=r"^st_lpips of image 1 is no number; look at the weights"):
        _ = meter.table


def test_the_worst_are_the_worst() -> None:
    names = ["mse", "psnr", "st_lpips"]
    table = torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table[[5, 9], 1] = -1
    table[[30, 2], 2] = 3
    psnr, distance = table[:, 1].tolist(), table[:, 2].tolist()
    by_psnr = sorted(range(40), key=lambda place: (psnr[place], place))
    assert worst_places(names, table, "psnr", 7) == by_psnr[:7]
    assert worst_places(names, table, "psnr", 99) == by_psnr
    by_distance = sorted(range(40), key=lambda place: (-distance[place], place))
    assert worst_places(names, table, "st_lpips", 7) == by_distance[:7]
    assert median_places(names, table, "psnr", 4) == by_psnr[18:22]
    assert median_places(names, table[:3], "psnr", 4) == worst_places(names, table[:3], "psnr", 3)


def test_a_table_of_all_images() -> None:
    table = torch.tensor([[0.0, math.inf], [1.5, 46.37]], dtype=torch.float64)
    text = figures_table(['a "b", c.png', "\udcff.png"], ["mse", "psnr"], table)
    assert text == 'name,mse,psnr\n"a ""b"", c.png",0,inf\n\\udcff.png,1.5,46.37\n'


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("FID", "rFID"),
        ("sFID", "rsFID"),
        ("KID", "rKID"),
        ("FD-DINOv2", "rFD-DINOv2"),
        ("CMMD", "rCMMD"),
        ("Fréchet distance on EfficientNet-Lite2", "rFD on EfficientNet-Lite2"),
        ("spatial Fréchet distance on resnet18", "rsFD on resnet18"),
        ("recall on resnet18", "recall of reconstructions on resnet18"),
        ("deviation of KID", "deviation of rKID"),
        ("deviation of kernel distance on resnet18", "deviation of rKD on resnet18"),
        ("coverage", "coverage of reconstructions"),
    ],
)
def test_figures_of_sets_are_called_those_of_reconstructions(label: str, expected: str) -> None:
    assert reconstruction_label(label) == expected
