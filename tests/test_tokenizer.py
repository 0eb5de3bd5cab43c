"""The tokenizer as a whole: shapes, sizes, normalisation, saving and loading."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq.config import from_dict, to_dict
from softvq.errors import InputError, RunError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.presets import PRESETS, preset
from softvq.tokenizers.quantizers import KLConfig, NoneConfig, SoftVQConfig, VQConfig
from softvq.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder, load_timm_weights

VIT = ViTConfig(width=48, depth=2, num_heads=3)
CONFIG = TokenizerConfig(
    encoder=VIT,
    decoder=VIT,
    num_latent_tokens=8,
    latent_dim=6,
    quantizer=SoftVQConfig(codebook_size=32, num_codebooks=2),
    image_size=64,
    patch_size=16,
)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(CONFIG).eval()


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (512, 512), (256, 512)])
def test_every_size_gives_the_same_number_of_tokens_and_decodes_at_any(size):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(dataclasses.replace(CONFIG, image_size=256)).eval()
    with torch.no_grad():
        latents = tokenizer.encode(torch.rand(1, 3, *size) * 2 - 1)
        assert latents.shape == (1, 8, 6)
        assert tokenizer.decode(latents, size=size).shape == (1, 3, *size)
        assert tokenizer.decode(latents).shape == (1, 3, 256, 256)


def test_position_tables_are_resampled_not_cropped(tokenizer):
    with torch.no_grad():
        table = tokenizer.encoder.pos_embed
        rows = torch.linspace(-1, 1, 4).repeat_interleave(4)[:, None]  # depends on the row alone
        table[:, 1:] = rows
        encoder = tokenizer.encoder
        seen = []
        encoder.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in (encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias):
            module.zero_()
        encoder(torch.zeros(1, 3, 128, 64))
    positions = seen[0][0, 1:33, 0].reshape(8, 4)
    assert torch.all(positions.diff(dim=0) > 0)
    torch.testing.assert_close(positions, positions[:, :1].expand(-1, 4))


@pytest.mark.parametrize("size", [(60, 64), (64, 65), (0, 64)])
def test_a_size_the_patch_does_not_divide_is_refused(tokenizer, size):
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels, expected a height and width divisible by 16"):
        tokenizer.encode(torch.zeros(1, 3, *size))


def test_latents_of_another_shape_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"latents are \[1, 9, 6\], expected \[batch, 8, 6\]"):
        tokenizer.decode(torch.zeros(1, 9, 6))


def test_an_image_does_not_depend_on_its_batch(tokenizer):
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        together = tokenizer.encode(images)
        torch.testing.assert_close(together[2:3], tokenizer.encode(images[2:3]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokenizer.encode(images.flip(0)).flip(0), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "quantizer", [SoftVQConfig(codebook_size=32), VQConfig(codebook_size=32), KLConfig(), NoneConfig()]
)
def test_every_quantizer_trains_end_to_end(quantizer):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(dataclasses.replace(CONFIG, quantizer=quantizer))
    output = tokenizer(torch.rand(2, 3, 64, 64))
    (output.images.square().mean() + sum(output.losses.values())).backward()
    unused = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert unused == []
    assert output.latents.dtype == torch.float32


@pytest.mark.parametrize("per_channel", [False, True])
def test_fitted_statistics_normalise_and_decode_undoes_them(tokenizer, per_channel):
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        raw = tokenizer.encode_raw(images)
        before = tokenizer.decode_raw(raw)
        tokenizer.fit_statistics(images.split(2), per_channel=per_channel)
        latents = tokenizer.encode(images)
        torch.testing.assert_close(tokenizer.decode(latents), before, atol=1e-5, rtol=1e-5)
    dims = (0, 1) if per_channel else (0, 1, 2)
    assert latents.mean(dim=dims).abs().max() < 1e-4
    assert (latents.std(dim=dims, correction=0) - 1).abs().max() < 1e-4
    assert (tokenizer.latent_std.unique().numel() > 1) == per_channel


def test_statistics_need_images(tokenizer):
    with pytest.raises(InputError, match="no images"):
        tokenizer.fit_statistics([])


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.latent_mean.fill_(0.25)
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint() == tokenizer.fingerprint()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("to_latents.bias"), r"1 tensors missing \(to_latents.bias\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 tensors unexpected \(extra\)"),
        (lambda t: t.update({"latent_std": torch.ones(7)}), r"latent_std is \[7\], expected \[6\]"),
        (lambda t: t["decoder.mask_token"].fill_(float("nan")), r"1 tensors not finite \(decoder.mask_token\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        ImageTokenizer.from_pretrained(tmp_path)


def test_a_config_of_another_save_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantizer"]["temperature"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json is not the one model.safetensors was saved with"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "softvq-generator"}, "format is 'softvq-generator', expected 'softvq-tokenizer'"),
        ({"version": 99}, "version is 99, this softvq reads 1"),
    ],
)
def test_folders_of_another_kind_are_refused(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        ImageTokenizer.from_pretrained(tmp_path)


def test_pickles_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin, a pickle"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../../nowhere", "a/b/c", "no-such-folder", "a b/c", "x/..", "org/na\nme"])
def test_names_that_are_neither_folder_nor_repository_are_refused(name):
    with pytest.raises(
        InputError, match="none of flowers-dit, photos-64, which come with softvq, and not the name of a"
    ):
        ImageTokenizer.from_pretrained(name)


def test_a_repository_that_cannot_be_had_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="SoftVQVAE/softvq-l-64: no such folder here, and not to be had") as caught:
        ImageTokenizer.from_pretrained("SoftVQVAE/softvq-l-64")
    assert "\n" not in str(caught.value)


def test_push_to_hub_uploads_the_saved_folder(tokenizer, monkeypatch):
    uploaded = {}

    class FakeApi:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = ImageTokenizer.from_pretrained(folder_path).fingerprint()

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert tokenizer.push_to_hub("me/mine", token="t") == "https://hub.example/me/mine"
    assert uploaded == {"token": "t", "me/mine": tokenizer.fingerprint()}
    with pytest.raises(InputError, match="expected owner/name"):
        tokenizer.push_to_hub("mine")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_a_round_trip(name):
    config = preset(name, image_size=512)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    assert from_dict(TokenizerConfig, to_dict(config)) == config
    if "tiny" not in name:
        assert config.num_latent_tokens * config.latent_dim == 2048
        assert tokenizer.quantizer.codebook.shape == (4, 8192, config.latent_dim)


@pytest.mark.parametrize(("name", "millions"), [("s-64", 44.54), ("b-64", 172.97), ("bl-64", 390.55), ("l-32", 609.15)])
def test_presets_have_the_papers_parameter_counts(name, millions):
    with torch.device("meta"):
        tokenizer = ImageTokenizer(preset(f"softvq-{name}"))
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 60}, "image_size is 60, expected a multiple of patch_size"),
        ({"num_latent_tokens": 0}, "num_latent_tokens is 0, expected 1 to 4096"),
        ({"num_latent_tokens": 7}, "num_codebooks is 2, expected a divisor of num_latent_tokens"),
        ({"latent_dim": 1 << 40}, "latent_dim is"),
        ({"head_channels": 0}, "head_channels is 0, expected 1 to 4096, or null"),
        ({"head_channels": 8, "image_size": 66, "patch_size": 6}, "patch_size is 6, expected a multiple of 4 for head"),
    ],
)
def test_impossible_architectures_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match="softvq-b-64"):
        preset("softvq-b-63")


def source_vit(monkeypatch, **fields):
    """Make `timm.create_model` build small random ViTs, since no test downloads weights."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    made = []

    def create(name, *, pretrained, num_classes, img_size, patch_size):
        sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, **fields}
        made.append(VisionTransformer(img_size=img_size, patch_size=patch_size, num_classes=num_classes, **sizes))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", create)
    return made


@pytest.mark.parametrize("fields", [{"init_values": 0.1}, {}, {"class_token": False, "global_pool": "avg"}])
def test_an_encoder_starts_from_a_timm_vit(monkeypatch, fields):
    made = source_vit(monkeypatch, **fields)
    encoder = ViTEncoder(VIT, image_size=64, patch_size=16, num_latent_tokens=4)
    sentence = load_timm_weights(encoder, "some_vit")
    source = made[0]
    torch.testing.assert_close(encoder.patch_embed.proj.weight, source.patch_embed.proj.weight)
    torch.testing.assert_close(encoder.pos_embed[:, -16:], source.pos_embed[:, -16:])
    tokens = torch.randn(2, 9, 48)
    torch.testing.assert_close(encoder.blocks(tokens), source.blocks(tokens))
    assert "latent_tokens" in sentence
    assert "\n" not in sentence


def test_a_vit_of_another_size_is_refused(monkeypatch):
    source_vit(monkeypatch, depth=3)
    decoder = ViTDecoder(VIT, image_size=64, patch_size=16, num_latent_tokens=4)
    with pytest.raises(InputError, match="width or depth"):
        load_timm_weights(decoder, "some_vit")


def test_weights_that_cannot_be_had_leave_the_encoder_random_and_say_so(monkeypatch):
    def create(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("timm.create_model", create)
    tokenizer = ImageTokenizer(dataclasses.replace(CONFIG, encoder=dataclasses.replace(VIT, pretrained="some_vit")))
    (sentence,) = tokenizer.load_backbones()
    assert "starts at random" in sentence


def test_an_unknown_timm_model_is_refused():
    encoder = ViTEncoder(VIT, image_size=64, patch_size=16, num_latent_tokens=4)
    with pytest.raises(InputError, match="no_such_vit"):
        load_timm_weights(encoder, "no_such_vit", pretrained=False)


def test_the_local_start_makes_tokens_attend_to_their_neighbours():
    torch.manual_seed(0)
    wide = dataclasses.replace(VIT, width=96, num_heads=2)
    encoder = ViTEncoder(wide, image_size=128, patch_size=16, num_latent_tokens=16)
    block = encoder.blocks[0]
    tokens = block.norm1(torch.cat([encoder.pos_embed[:, 1:], encoder.latent_pos_embed], dim=1))
    queries, keys, _ = block.attn.qkv(tokens).reshape(1, 80, 3, 2, 48).unbind(2)
    attention = torch.einsum("bqhd,bkhd->bhqk", queries, keys).div(48**0.5).softmax(dim=-1).mean(dim=1)[0, 64:, :64]
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    own = places.reshape(16, 4, 2).mean(dim=1)  # a latent token starts in the middle of its run of four patches
    distance = torch.cdist(own, places)
    attended = (attention / attention.sum(dim=-1, keepdim=True) * distance).sum(dim=-1)
    assert attended.mean() < 0.7 * distance.mean()


def test_the_released_start_is_small_noise():
    torch.manual_seed(0)
    encoder = ViTEncoder(dataclasses.replace(VIT, init="released"), image_size=64, patch_size=16, num_latent_tokens=4)
    assert encoder.pos_embed.detach().std() == pytest.approx(0.02, rel=0.15)
    queries, keys, _ = encoder.blocks[0].attn.qkv.weight.chunk(3)
    assert not torch.equal(queries, keys)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"images are \[3, 64, 64\], expected \[batch, 3, height, width\]"),
        (torch.zeros(1, 64, 64, 3), r"images are \[1, 64, 64, 3\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images are torch.uint8, expected floating-point"),
    ],
)
def test_images_of_another_kind_are_refused(tokenizer, images, message):
    with pytest.raises(InputError, match=message):
        tokenizer._check_images(images)


def test_a_folder_around_a_model_folder_is_pointed_out(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "run/tokenizer")
    with pytest.raises(InputError, match=r"holds no config.json; did you mean .*run/tokenizer"):
        ImageTokenizer.from_pretrained(tmp_path / "run")


def test_a_failed_save_leaves_the_whole_folder_as_it_was(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("my own words")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    softer = dataclasses.replace(CONFIG, quantizer=SoftVQConfig(codebook_size=32, num_codebooks=2, temperature=0.5))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("softvq.hub.write_json", full_disk)
        with pytest.raises(RunError, match="No space left on device"):
            ImageTokenizer(softer).save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    ImageTokenizer(softer).save_pretrained(tmp_path / "model")
    assert ImageTokenizer.from_pretrained(tmp_path / "model").config == softer
    assert (tmp_path / "model/README.md").read_text() == "my own words"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats_are_refused(tokenizer, tmp_path, dtype):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path, lambda t: t.update({"decoder.mask_token": torch.ones(1, 1, 48).to(dtype)}))
    with pytest.raises(InputError, match=f"not floats .decoder.mask_token is {dtype}"):
        ImageTokenizer.from_pretrained(tmp_path)


def test_values_beyond_float32_and_deviations_of_zero_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path, lambda t: t.update({"decoder.mask_token": torch.full((1, 1, 48), 1e300, dtype=torch.float64)}))
    with pytest.raises(InputError, match="not finite"):
        ImageTokenizer.from_pretrained(tmp_path)
    tokenizer.latent_std[2] = 0
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="latent_std holds values of 0 or less"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision_encode_and_decode(tokenizer, dtype):
    model = tokenizer.to(dtype)
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 64, 64).to(dtype))
        assert bool(model.decode(latents).isfinite().all())
