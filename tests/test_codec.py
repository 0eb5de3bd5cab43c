"""The codec: what comes back follows from the steps, bytes from the entropy, and nothing hostile does harm."""

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from benchmarks.codec_fuzz import damaged, outcome, resealed, small_tokenizer, whole_files
from softvq import codec
from softvq.codec import CodecConfig, compress, decompress, fitted_size
from softvq.data.images import center_crop, read_image, to_image, to_tensor
from softvq.data.svq import LAYOUT, MAX_BYTES, SvqHeader, pack, unpack
from softvq.errors import InputError, RunError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.quantizers import KLConfig, ProductConfig, VQConfig
from tests.program import MODEL, Program, make_model, photograph


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    """Nested, and with latents that are normalised."""
    found = small_tokenizer()
    pictures = [to_tensor(photograph(32, 32, seed))[None] for seed in range(20)]
    found.fit_statistics(pictures, per_channel=True)
    return found


def with_quantizer(quantizer: Any) -> ImageTokenizer:
    fields = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__} | {"quantizer": quantizer}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ImageTokenizer(TokenizerConfig(**fields)).eval()


@torch.inference_mode()
def expected(tokenizer: ImageTokenizer, image: Image.Image, bits: int, tokens: int) -> Image.Image:
    step = 8 / 2**bits
    latents = tokenizer.encode(to_tensor(image)[None])[:, :tokens].double()
    return to_image(tokenizer.decode((latents / step).round().clamp(-(2**bits), 2**bits).float() * step)[0])


@pytest.mark.parametrize(("bits", "tokens"), [(1, 16), (3, 16), (4, 7), (12, 4)])
def test_latents_come_back_in_steps(tokenizer: ImageTokenizer, bits: int, tokens: int) -> None:
    image = photograph(32, 32, 3)
    data = compress(tokenizer, image, CodecConfig(bits=bits, tokens=tokens))
    header, _ = unpack(data)
    assert (header.bits, header.tokens, header.width, header.height, header.top) == (bits, tokens, 32, 32, 0)
    assert decompress(tokenizer, data).tobytes() == expected(tokenizer, image, bits, tokens).tobytes()
    assert data == compress(tokenizer, image, CodecConfig(bits=bits, tokens=tokens))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_payloads_take_the_entropy_under_the_normal_distribution(tokenizer: ImageTokenizer, bits: int) -> None:
    image, step = photograph(32, 32, 3), 8 / 2**bits
    with torch.inference_mode():
        steps = (tokenizer.encode(to_tensor(image)[None]) / step).round().numpy()
    likelihood = norm.cdf(step * (steps + 0.5)) - norm.cdf(step * (steps - 0.5))
    entropy = -sum(math.log2(max(each, 1e-9)) for each in likelihood.ravel())
    header, payload = unpack(compress(tokenizer, image, CodecConfig(bits=bits)))
    assert 8 * len(payload) <= entropy + 64
    if header.coder == "latents":
        assert 8 * len(payload) >= entropy - 1


def test_channels_that_are_not_normal_bring_their_own_statistics(tokenizer: ImageTokenizer) -> None:
    image = photograph(32, 32, 3)
    sizes = {}
    for shift in (0.0, 3.0):
        moved = small_tokenizer()
        moved.load_state_dict(tokenizer.state_dict())
        moved.latent_mean -= shift * moved.latent_std
        data = compress(moved, image, CodecConfig(bits=6))
        sizes[shift] = len(data)
        assert decompress(moved, data).tobytes() == expected(moved, image, 6, 16).tobytes()
    assert unpack(data)[0].coder == "latents-fitted"
    assert sizes[3.0] < sizes[0.0] + 2 * tokenizer.config.latent_dim + 8  # without them 6 bits more for each number


def test_deviations_are_the_same_bits_on_every_machine() -> None:
    steps = np.arange(-128, 128, dtype=np.int32)
    _, deviations = codec._normal(np.stack([steps, steps]), (1, len(steps)), 3)
    np.testing.assert_allclose(deviations, [2 ** (step / 16) for step in steps.tolist()], rtol=1e-14)
    root, power, expected = math.sqrt(math.sqrt(math.sqrt(math.sqrt(2.0)))), 1.0, []
    for _ in range(16):
        expected.append(power)
        power *= root
    whole = [math.ldexp(expected[step % 16], step // 16) for step in steps.tolist()]
    np.testing.assert_array_equal(deviations, whole)  # IEEE 754 leaves nothing open in these; exp2 it does


def test_one_codeword_stands_for_its_token() -> None:
    image = photograph(32, 32, 3)
    for quantizer in (MODEL.quantizer, VQConfig(codebook_size=16), ProductConfig(parts=2, inner=VQConfig())):
        ours = with_quantizer(quantizer)
        data = compress(ours, image, CodecConfig(coder="codewords"))
        with torch.inference_mode():
            indices = ours.encode_indices(to_tensor(image)[None])
            wanted = to_image(ours.decode_indices(indices)[0])
        assert decompress(ours, data).tobytes() == wanted.tobytes()
        bits = indices.numel() * math.log2(16 if quantizer != ProductConfig(parts=2, inner=VQConfig()) else 8192)
        assert bits - 8 <= 8 * len(unpack(data)[1]) <= bits + 64


def test_all_codewords_with_fine_weights_are_the_latents() -> None:
    ours, image = with_quantizer(MODEL.quantizer), photograph(32, 32, 3)
    with torch.inference_mode():
        wanted = ours.decode(ours.encode(to_tensor(image)[None]))[0]
    errors = []
    for top in (2, 8, 16):
        data = compress(ours, image, CodecConfig(coder="codewords", top=top, bits=12))
        errors.append((to_tensor(decompress(ours, data)) - wanted.clamp(-1, 1)).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3 + 1 / 255


@pytest.mark.parametrize("size", [(32, 32), (70, 31), (9, 64), (1, 50)])
@pytest.mark.parametrize("fit", ["stretch", "shape", "crop"])
def test_pictures_come_back_at_their_size(tokenizer: ImageTokenizer, size: tuple[int, int], fit: Any) -> None:
    image = photograph(32, 32, 3).resize(size)
    picture = decompress(tokenizer, compress(tokenizer, image, CodecConfig(fit=fit, bits=9)))
    assert picture.size == (size if fit != "crop" else (min(size),) * 2)


def test_fits_are_what_they_say(tokenizer: ImageTokenizer) -> None:
    assert [fitted_size(tokenizer, 80, 40, fit) for fit in ("stretch", "crop")] == [(32, 32)] * 2
    assert fitted_size(tokenizer, 400, 100, "shape") == (16, 64)
    assert fitted_size(tokenizer, 1, 60_000, "shape") == (16 * 8, 8)
    image = photograph(48, 96, 3)
    cropped = compress(tokenizer, image, CodecConfig(fit="crop"))
    square = compress(tokenizer, center_crop(image, 32), CodecConfig(fit="crop"))
    assert unpack(cropped)[1] == unpack(square)[1]
    stretched = compress(tokenizer, image.resize((32, 32), Image.Resampling.BICUBIC))
    assert unpack(compress(tokenizer, image))[1] == unpack(stretched)[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokens": 3}, "tokens is 3, this tokenizer decodes 4 to 16"),
        ({"tokens": 17}, "tokens is 17, this tokenizer decodes 4 to 16"),
        ({"bits": 0}, "bits is 0, expected 1 to 12"),
        ({"bits": 13}, "bits is 13, expected 0 to 12"),
        ({"coder": "codewords", "top": 65}, "top is 65, expected 1 to 64"),
        ({"coder": "codewords", "top": 2, "bits": 0}, "bits is 0, expected 1 to 12 for the weights of 2 codewords"),
    ],
)
def test_what_cannot_be_written_is_told(tokenizer: ImageTokenizer, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compress(tokenizer, photograph(32, 32), CodecConfig(**config))


def test_quantizers_without_codewords_are_told() -> None:
    codewords = CodecConfig(coder="codewords", top=2)
    with pytest.raises(InputError, match="the quantizer is 'kl', which has no codewords; take coder latents"):
        compress(with_quantizer(KLConfig()), photograph(32, 32), codewords)
    product = with_quantizer(ProductConfig(parts=2, inner=VQConfig(codebook_size=16)))
    with pytest.raises(InputError, match="codewords of 'product' have no common weights; take top 1 and bits 0"):
        compress(product, photograph(32, 32), codewords)


def test_latents_that_are_not_finite_are_told() -> None:
    broken = with_quantizer(KLConfig())
    torch.nn.init.constant_(broken.to_latents.weight, math.inf)
    with pytest.raises(RunError, match="latents of this picture are not finite"):
        compress(broken, photograph(32, 32))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 2, "is of version 2, this softvq reads 1"),
        (2, 3, "has coder 3"),
        (3, 9, "fit 9"),
        (4, 200, "bits is 200"),
        (5, b"12345678", "belongs to tokenizer 3132333435363738"),
        (6, 0, "width is 0"),
        (7, 65_535, "the limit is 64,000,000"),
        (8, 65_535, "tokens is 65535, this tokenizer decodes 4 to 16"),
        (9, 1, "top is 1, expected 0 to 0"),
    ],
)
def test_impossible_headers_are_refused(tokenizer: ImageTokenizer, place: int, value: Any, message: str) -> None:
    data = compress(tokenizer, photograph(1, 1).resize((3000, 20)))
    fields = list(LAYOUT.unpack_from(data))
    fields[place] = value
    with pytest.raises(InputError, match=message):
        decompress(tokenizer, resealed(LAYOUT.pack(*fields) + data[LAYOUT.size :]))


def test_a_header_has_its_layout() -> None:
    header = SvqHeader(
        coder="codewords", fit="crop", bits=5, fingerprint=b"abcdefgh", width=258, height=258, tokens=64, top=3
    )
    data = pack(header, b"wxyz")
    assert data[:24] == b"\x89SVQ\x01\x02\x02\x05abcdefgh\x02\x01\x02\x01\x40\x00\x03\x00"
    assert data[28:] == b"wxyz"
    assert unpack(data) == (header, b"wxyz")


def test_damaged_files_are_refused(tokenizer: ImageTokenizer) -> None:
    files = whole_files(tokenizer)
    found = {outcome(tokenizer, data, files) for _, data in damaged(files, 270, seed=1)}
    assert found == {"refused", "picture"}
    assert {outcome(tokenizer, data, files) for data in files} == {"picture"}


@pytest.mark.parametrize(
    "config",
    [
        CodecConfig(),
        CodecConfig(bits=1, tokens=4),
        CodecConfig(coder="codewords"),
        CodecConfig(coder="codewords", top=4, bits=3),
    ],
)
def test_what_no_encoder_wrote_is_refused_though_its_checksum_fits(
    tokenizer: ImageTokenizer, config: CodecConfig
) -> None:
    header, payload = unpack(compress(tokenizer, photograph(32, 32, 3), config))
    assert decompress(tokenizer, pack(header, payload)).size == (32, 32)
    others = [payload + word for word in (b"\0" * 4, b"\xff" * 4, b"\1\2\3\4")]
    others += [payload[:end] for end in range(0, len(payload), 4)]
    for other in others:
        with pytest.raises(InputError, match=r"holds|no encoder"):
            decompress(tokenizer, pack(header, other))


def test_any_single_bit_is_noticed(tokenizer: ImageTokenizer) -> None:
    data = compress(tokenizer, photograph(32, 32), CodecConfig(tokens=4, bits=1))
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(InputError):
            unpack(bytes(changed))


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(capsys)
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    make_model(tmp_path / "other", seed=1)
    photograph(48, 40).save("a.png")
    done = program("compress", "model", "a.png", "a.svq", "--bits", "8")
    assert done.code == 0
    assert done.out.startswith(f"a.svq: {Path('a.svq').stat().st_size:,} bytes, ")
    assert program("decompress", "model", "a.svq", "b.png").out == "b.png: 40 x 48\n"
    assert read_image("b.png").tobytes() == decompress(model, Path("a.svq").read_bytes()).tobytes()
    program.refuses("decompress", "other", "a.svq", "c.png", names=("a.svq", "belongs to tokenizer"))
    program.refuses("decompress", "model", "a.svq", "b.png", names=("b.png", "already there"))
    program.refuses("decompress", "model", "a.png", "c.png", names=("a.png", "is not a picture compressed by softvq"))
    program.refuses("decompress", "model", "a.svq", "c.gif", names=("c.gif", ".png"))
    program.refuses("compress", "model", "a.png", "c.png", names=("c.png", ".svq"))
    program.refuses("compress", "model", "a.png", "c.svq", "--tokens", "2", names=("tokens is 2",))
    program.refuses("decompress", "model", "none.svq", "c.png", names=("none.svq", "no such file"))
    Image.new("RGB", (16_384, 1)).save("long.png")
    assert program("compress", "model", "long.png", "long.svq").code == 0
    program.refuses("decompress", "model", "long.svq", "c.webp", names=("c.webp", "16384 x 1", "16,383", ".png"))
    assert program("decompress", "model", "long.svq", "c.jpg").code == 0
    with Path("large.svq").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    program.refuses("decompress", "model", "large.svq", "c.png", names=("large.svq", "is larger than"))


def test_the_extra_is_named(tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "constriction":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"the codec needs constriction; run: pip install 'softvq\[codec\]'"):
        compress(tokenizer, photograph(32, 32))
