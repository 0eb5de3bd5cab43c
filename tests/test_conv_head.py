"""The decoder's convolutions, which paint across the borders of patches."""

import torch
import torch.nn.functional as F

from softvq.tokenizers.vit import ConvHead, ViTConfig, ViTDecoder

VIT = ViTConfig(width=48, depth=2, num_heads=3)


def test_a_convolutional_head_starts_as_the_linear_layer_alone():
    torch.manual_seed(0)
    decoder = ViTDecoder(VIT, image_size=64, patch_size=16, num_latent_tokens=4, head_channels=8)
    latents = torch.randn(2, 4, VIT.width)
    images = decoder(latents, (64, 96))
    patches = decoder.to_pixels(decoder.patch_tokens(latents, (4, 6)))
    for number in range(24):
        row, column = 16 * (number // 6), 16 * (number % 6)
        patch = images[:, :, row : row + 16, column : column + 16].permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(patch, patches[:, number])


def test_a_convolutional_head_paints_across_the_borders_of_patches():
    torch.manual_seed(0)
    head = ConvHead(12, 5, 16)
    head.paint.reset_parameters()
    tokens = torch.randn(1, 6, 12)
    maps = torch.zeros(1, 5, 8, 12)
    for number in range(6):
        square = head.to_maps(tokens[0, number]).view(4, 4, 5)
        row, column = 4 * (number // 3), 4 * (number % 3)
        maps[0, :, row : row + 4, column : column + 4] = square.permute(2, 0, 1)
    painted = head.paint(F.gelu(head.mix(maps)))
    expected = torch.zeros(1, 3, 32, 48)
    for channel in range(3):
        for place in range(16):
            expected[0, channel, place // 4 :: 4, place % 4 :: 4] = painted[0, 16 * channel + place]
    torch.testing.assert_close(head(tokens, (2, 3)), expected)
    moved = tokens.clone()
    moved[0, 0] += 1
    changed = (head(moved, (2, 3)) != head(tokens, (2, 3)))[0].any(0)
    assert changed[:24, :24].all()  # two convolutions at a quarter of the size reach 8 px into the neighbours
    assert not changed[24:].any()
    assert not changed[:, 24:].any()
