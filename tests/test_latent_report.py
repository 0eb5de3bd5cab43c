import itertools
import math
import re

import pytest
import torch
from PIL import Image
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation import latent_report as report
from softvq.evaluation.charts import bar_chart, heat_map, line_chart, photo_map, strips
from softvq.evaluation.latent_report import Gathered
from softvq.evaluation.latent_sections import latent_study, summary_of
from softvq.evaluation.mixture import choose_mixture, fit_mixture
from softvq.evaluation.probing import keys_of_names
from softvq.evaluation.report import Section, report_page
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import DIM, MODEL, SIZE, TOKENS
from tests.test_page import Page, decoded


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys(count: int) -> Tensor:
    return keys_of_names([f"{i}.png" for i in range(count)])


def gathered(latents: Tensor, classes: int = 2, **changes: object) -> Gathered:
    count = len(latents)
    fields = {
        "names": tuple(f"{i}.png" for i in range(count)),
        "latents": latents,
        "keys": keys(count),
        "labels": torch.arange(count) % classes if classes else torch.full((count,), -1),
        "classes": tuple("abcdefgh"[:classes]),
        "pixels": latents.flatten(1),
    }
    return Gathered(**{**fields, **changes})


def decode(latents: Tensor) -> Tensor:
    """Paint every number as a pixel, of three equal channels."""
    return latents.flatten(1).reshape(len(latents), 1, TOKENS, -1).expand(-1, 3, -1, -1).clamp(-1, 1) / 8


def test_moments_of_channels_are_those_of_known_distributions() -> None:
    uniform = torch.linspace(-1, 1, 20001, dtype=torch.float64).reshape(-1, 1, 1)
    flat = torch.full_like(uniform, 3.0)
    coin = torch.where(torch.arange(20001) < 5000, 1.0, 0.0).double().reshape(-1, 1, 1)
    found = report.channel_figures(torch.cat([uniform, flat, coin], 2))
    p = 5000 / 20001
    assert found["mean"] == pytest.approx([0, 3, p])
    assert found["std"] == pytest.approx([1 / math.sqrt(3), 0, math.sqrt(p * (1 - p))], rel=1e-3)
    assert found["skewness"] == pytest.approx([0, 0, (1 - 2 * p) / math.sqrt(p * (1 - p))], abs=1e-9)
    assert found["excess_kurtosis"] == pytest.approx([-1.2, 0, (1 - 6 * p * (1 - p)) / (p * (1 - p))], abs=1e-3)


def test_correlations() -> None:
    x = random(500, 1, 1)
    matrix = report.correlations(torch.cat([x, 2 * x + 1, -x, torch.ones_like(x)], 2))
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(matrix, torch.tensor(expected).double())


def test_effective_rank_of_what_is_known() -> None:
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double()
    values, _ = report.principal_components(corners, 1)
    assert report.effective_rank(values) == pytest.approx(5)
    line = torch.outer(torch.arange(9.0), torch.tensor([1.0, -2.0, 3.0])).double()
    values, places = report.principal_components(line, 1)
    assert report.effective_rank(values) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(places[:, 0].abs(), (torch.arange(9.0).double() - 4).abs() * math.sqrt(14))
    assert report.effective_rank(torch.zeros(3)) == 0
    assert report.effective_rank(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


@pytest.mark.parametrize("shape", [(7, 12), (40, 6)])
def test_principal_components_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    vectors = random(*shape)
    values, places = report.principal_components(vectors, 3)
    centred = vectors - vectors.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(values[: len(s)], s.square() / len(vectors), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(places.abs(), (u * s)[:, :3].abs(), atol=1e-8, rtol=1e-6)
    assert all(column[column.abs().argmax()] > 0 for column in places.mT)


def test_spectra_of_the_three_covariances() -> None:
    latents = random(300, 4, 1) * torch.tensor([1.0, -1.0, 0.5]).double()  # channels are one
    found = report.spectrum_figures(latents)
    assert found["channels"]["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert found["tokens"]["effective_rank"] == pytest.approx(4, abs=0.1)
    assert found["images"]["effective_rank"] == pytest.approx(found["tokens"]["effective_rank"], abs=1e-3)
    assert [found[name]["largest_possible"] for name in ("channels", "tokens", "images")] == [3, 4, 12]
    assert sum(found["tokens"]["shares"]) == pytest.approx(1)


def clusters(count: int = 300) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3
    centres = torch.tensor([[9.0, 0, 0, 0], [-9.0, 0, 3, 0], [0.0, 9, 0, 0]]).double()
    widths = torch.tensor([1.0, 0.5, 2.0]).double()
    return centres[labels] + widths[labels][:, None] * random(count, 4), labels


def test_em_finds_separate_clusters() -> None:
    points, labels = clusters()
    number, found = choose_mixture(points, keys(300), 6)
    assert (number, len(found)) == (3, 6)
    owners = found[2].responsibilities(points).argmax(1)
    for label in range(3):
        (owner,) = owners[labels == label].unique().tolist()
        own = points[labels == label]
        torch.testing.assert_close(found[2].means[owner], own.mean(0), atol=1e-3, rtol=0)
        torch.testing.assert_close(found[2].variances[owner], own.var(0, correction=0), atol=1e-2, rtol=0)
        assert float(found[2].shares[owner]) == pytest.approx(1 / 3, abs=1e-3)


def test_one_component_is_the_gaussian_and_bic_prefers_it_for_one() -> None:
    points = random(400, 5) * torch.tensor([1.0, 2, 3, 4, 5]).double() + 7
    number, found = choose_mixture(points, keys(400), 5)
    assert number == 1
    mean, std = points.mean(0), points.std(0, correction=0)
    expected = torch.distributions.Normal(mean, std).log_prob(points).sum()
    assert found[0].log_likelihood == pytest.approx(float(expected))
    assert found[0].bic == pytest.approx(10 * math.log(400) - 2 * float(expected))
    rising = [fit.log_likelihood for fit in found]
    assert rising == sorted(rising)


def test_a_mixture_does_not_depend_on_the_order_of_its_points() -> None:
    points, _ = clusters(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    first, second = fit_mixture(points, keys(120), 4), fit_mixture(points[order], keys(120)[order], 4)
    assert first.log_likelihood == pytest.approx(second.log_likelihood, rel=1e-9)
    torch.testing.assert_close(first.means, second.means)
    assert torch.equal(first.means, fit_mixture(points, keys(120), 4).means)


@pytest.mark.parametrize(
    ("points", "number", "sentence"),
    [
        (torch.ones(5, 2), 2, "all the same"),
        (random(5, 2), 6, "number is 6, expected 1 to the 5 points"),
        (random(5, 2) / 0, 2, "not finite"),
    ],
)
def test_what_has_no_clusters_is_refused(points: Tensor, number: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        fit_mixture(points, keys(5), number)


def test_modes_of_images_are_counted_whatever_their_covariance() -> None:
    mixing = random(TOKENS * 2, TOKENS * 2, seed=4)
    cloud = (random(120, TOKENS * 2) @ mixing).unflatten(1, (TOKENS, 2))
    assert report.mode_figures(gathered(cloud))["modes"] == 1
    apart = cloud + 40 * mixing.norm() * torch.where(torch.arange(120) % 2 == 0, 1.0, -1.0)[:, None, None]
    found = report.mode_figures(gathered(apart))
    assert found["modes"] == 2
    assert sorted(found["shares"]) == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match="all the same"):
        report.mode_figures(gathered(torch.ones(20, 2, 2).double()))


def test_classes_are_read_off_latents_where_there_are_some() -> None:
    latents = random(80, TOKENS, 3)
    assert report.class_figures(gathered(latents, classes=0)) is None
    assert report.class_figures(gathered(latents[:2], classes=2)) is None
    blind = report.class_figures(gathered(latents))
    assert blind is not None
    assert (blind["train"], blind["val"]) == (60, 20)
    assert blind["latents"]["linear"]["accuracy"] < 0.85
    latents += 20 * torch.where(torch.arange(80) % 2 == 0, 1.0, -1.0)[:, None, None]
    seeing = report.class_figures(gathered(latents))
    assert seeing is not None
    assert seeing["latents-pooled"]["linear"]["accuracy"] == seeing["latents"]["knn"]["accuracy"] == 1


def test_noise_has_the_psnr_that_its_size_gives() -> None:
    latents = random(64, TOKENS, 200) / 3
    found = report.noise_figures(gathered(latents), lambda z: decode(z.clamp(-9, 9) / 9), levels=(0.1, 0.4), photos=16)
    assert found.images.shape == (4, 3, 3, TOKENS, 200)
    deviation = float(latents.std(correction=0))
    for row in found.figures["levels"]:
        pixel = row["level"] * deviation / 72
        assert row["psnr"] == pytest.approx(10 * math.log10(4 / pixel**2), abs=0.1)
    whole = report.noise_figures(gathered(latents), lambda z: decode(torch.zeros_like(z)))
    assert [(row["psnr"], row["unchanged"]) for row in whole.figures["levels"]] == [(None, 32)] * 5


def test_noise_belongs_to_photographs_not_to_their_order() -> None:
    data = gathered(random(12, TOKENS, 6))
    back = gathered(data.latents.flip(0), keys=data.keys.flip(0), names=data.names[::-1])
    first, second = report.noise_figures(data, decode), report.noise_figures(back, decode)
    for one, other in zip(first.figures["levels"], second.figures["levels"], strict=True):
        assert one["psnr"] == pytest.approx(other["psnr"], rel=1e-6)


def test_lines_go_from_one_photograph_to_another() -> None:
    data = gathered(random(20, TOKENS, 6))
    found = report.interpolation_figures(data, lambda z: decode(z / 8), steps=5)
    assert found.images.shape[:2] == (4, 5)
    assert found.figures["straightness"] == pytest.approx(1)  # this decoder is linear
    line = found.figures["lines"][0]
    ends = data.latents[[data.names.index(line["from"]), data.names.index(line["to"])]]
    torch.testing.assert_close(found.images[0, [0, 4]], decode(ends.float() / 8))
    torch.testing.assert_close(found.images[0, 2], found.images[0, [0, 4]].mean(0))
    bent = report.interpolation_figures(data, lambda z: decode(z.sin()), steps=5)
    assert bent.figures["straightness"] < 0.95


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_what_looking_at_every_pair_finds(metric: str) -> None:
    vectors = random(30, 5)
    unit = torch.nn.functional.normalize(vectors) if metric == "cosine" else vectors
    far = torch.cdist(unit, unit).fill_diagonal_(math.inf)
    assert torch.equal(report.neighbours_of(vectors, 6, metric), far.argsort(1)[:, :6])


def test_copies_are_neighbours_and_none_is_its_own() -> None:
    found = report.neighbours_of(torch.ones(9, 2).double(), 4)
    assert found.shape == (9, 4)
    assert not bool((found == torch.arange(9)[:, None]).any())


def test_shared_neighbours() -> None:
    first, second = torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[2, 1], [2, 3], [4, 5]])
    assert report.overlap(first, second) == 0.5
    latents = random(40, TOKENS, 3)
    found, own = report.neighbour_figures(gathered(latents, encoder=random(40, 9, seed=2)))
    assert own.shape == (40, 10)
    assert found["overlap_with_pixels"] == 1
    assert found["overlap_with_encoder"] == pytest.approx(found["chance"], abs=0.1)
    assert found["same_class_by_chance"] == pytest.approx(19 / 39)
    apart = latents + 50 * (torch.arange(40) % 2)[:, None, None]
    assert report.neighbour_figures(gathered(apart))[0]["same_class"] == 1
    assert report.neighbour_figures(gathered(latents, classes=0))[0]["same_class"] is None


def tokenizer() -> ImageTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTokenizer(MODEL).eval()


def test_codewords_replace_one_token() -> None:
    model, data = tokenizer(), gathered(random(9, TOKENS, DIM))
    model.latent_mean += 0.3
    model.latent_std *= 2
    indices = torch.arange(9)[:, None].repeat(1, TOKENS)
    indices[:, 1] = torch.tensor([3, 3, 3, 3, 5, 5, 5, 0, 0])
    seen: list[Tensor] = []
    found = report.codeword_figures(model, data, indices, lambda z: seen.append(z) or decode(z))
    assert found.images.shape[:2] == (TOKENS, 9)
    row = found.figures["tokens"][1]
    assert (row["token"], row["used"], row["codewords"][:3]) == (1, 3, [3, 5, 0])
    assert row["shares"][:3] == pytest.approx([4 / 9, 3 / 9, 2 / 9])
    latents = seen[0].unflatten(0, (TOKENS, 9))
    own = data.latents[data.names.index(found.figures["photograph"])].float()
    with torch.no_grad():
        expected = model.quantizer.lookup(torch.full((1, TOKENS), 5))[0, 1]
    torch.testing.assert_close(latents[1, 2, 1], (expected - 0.3) / 2)
    for token in range(TOKENS):
        others = [i for i in range(TOKENS) if i != token]
        assert torch.equal(latents[token, :, others], own[others].expand(9, -1, -1))
        assert torch.equal(latents[token, 0], own)


def study(count: int = 24, classes: int = 2) -> tuple[dict, list[Section]]:
    data = gathered(random(count, TOKENS, DIM), classes)
    pictures = [Image.new("RGB", (16, 16), (10 * i, 0, 0)) for i in range(count)]
    indices = torch.arange(count)[:, None].repeat(1, TOKENS) % 16
    model = tokenizer()
    return latent_study(model, data, pictures, indices, lambda z: model.decode(z).detach().clamp(-1, 1))


def test_the_page_has_a_figure_a_section_and_fetches_nothing() -> None:
    found, sections = study()
    hostile = "\"'><script>alert(1)</script>&amp;$title"
    source = report_page(hostile, hostile, summary_of(found), sections, {hostile: hostile})
    page = Page(source)
    titles = ["Channels", "Correlation of channels", "Spectrum", "Modes", "Classes", "Noise", "Between photographs"]
    assert [section.title for section in sections] == [*titles, "Neighbours", "Map", "Codewords"]
    assert source.count("<section>") == source.count("<figure>") == len(page.pictures) == len(sections)
    assert all(part.count("<img") == 1 for part in source.split("<section>")[1:])
    assert page.words().count(hostile) == 5  # title, heading, lead, fact and its value
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "style", "onload"} & attributes.keys()
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]+", "", source))
    assert "default-src 'none'" in source
    assert "prefers-color-scheme: dark" in source
    for picture in page.pictures:
        assert len(decoded(picture).convert("RGB").getcolors(1 << 20)) > 1
        assert picture["alt"]
    assert not re.search(r"\b(nan|inf|None)\b", page.words())


def test_what_does_not_apply_is_left_out() -> None:
    data = gathered(random(8, TOKENS, DIM), classes=0)
    pictures = [Image.new("RGB", (16, 16))] * 8
    found, sections = latent_study(tokenizer(), data, pictures, None, decode)
    assert found["classes"] is found["codewords"] is None
    assert not {"Classes", "Codewords"} & {section.title for section in sections}
    with pytest.raises(InputError, match="there are 7 photographs, expected at least 8"):
        latent_study(tokenizer(), gathered(random(7, TOKENS, DIM)), pictures[:7], None, decode)


def test_latents_of_one_number_have_a_report_too() -> None:
    data = gathered(random(12, 1, 1))

    def painter(z: Tensor) -> Tensor:
        return z.reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 9

    found, _ = latent_study(tokenizer(), data, [Image.new("RGB", (16, 16))] * 12, None, painter)
    assert found["spectrum"]["images"]["effective_rank"] == pytest.approx(1)


def test_charts_show_what_they_are_given() -> None:
    low = line_chart({"a": [(0.0, 1.0), (1.0, 1.0)], "b": [(0.0, 2.0), (1.0, 2.0)]}, across="x", up="y")
    assert low.size == line_chart({"a": [(1.0, 3.0)]}, across="x", up="y", points=True).size
    assert {(0, 114, 178), (213, 94, 0)} <= {colour for _, colour in low.getcolors(1 << 16)}
    high = bar_chart(["p", "q"], [0.1, 1.0], [(0.1, 0.1), (0.9, 1.1)], across="x", up="y")
    blue = [
        sum(high.getpixel((x, y)) == (0, 114, 178) for x in half for y in range(high.height))
        for half in (range(high.width // 2), range(high.width // 2, high.width))
    ]
    assert 8 < blue[1] / blue[0] < 12
    picture = heat_map(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]))
    corners = [picture.getpixel((x, y)) for y in (0, picture.height - 1) for x in (0, picture.width - 1)]
    assert corners[:3] == [(193, 18, 31), (255, 255, 255), (0, 114, 178)]


def test_photographs_lie_where_their_coordinates_say() -> None:
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    places = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 5.0]])
    image = photo_map(places, pictures, torch.tensor([0, 0, -1]))
    side = image.width
    spots = [(26, side - 26), (side - 26, side - 26), (side - 26, 26)]
    assert [image.getpixel(spot) for spot in spots] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert photo_map(torch.zeros(300, 2), [pictures[0]] * 300, torch.zeros(300).long()).size == image.size


@pytest.mark.parametrize("size", [SIZE, 512])
def test_strips_are_rows_with_captions(size: int) -> None:
    image = strips(torch.zeros(2, 3, 3, size, size), ["a", "b", "c"])
    assert (image.width, image.height) == (3 * 128 + 4 * 16, 2 * (128 + 20) + 3 * 16)
