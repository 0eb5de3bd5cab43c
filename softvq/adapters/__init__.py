"""The tokenizer as other libraries expect one: diffusers' autoencoders, torchvision's transforms, `datasets`' map."""

from softvq.adapters.autoencoder import AutoencoderTokens, Decoded, Encoded, Posterior
from softvq.adapters.generation import Generated, TokensPipeline
from softvq.adapters.pictures import ToTokens, tokenize_images

__all__ = [
    "AutoencoderTokens",
    "Decoded",
    "Encoded",
    "Generated",
    "Posterior",
    "ToTokens",
    "TokensPipeline",
    "tokenize_images",
]
