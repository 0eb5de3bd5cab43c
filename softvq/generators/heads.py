"""The small network that turns the noise of one token into the token, given what a transformer says of it."""

from jaxtyping import Float
from torch import Tensor, nn

from softvq.generators.transformer import TimestepEmbedding

__all__ = ["DenoisingHead", "HeadBlock"]


class DenoisingHead(nn.Module):
    """A residual MLP on single tokens, modulated by time and the transformer's vector (arXiv:2406.11838, section 4.1).

        vector = SiLU(embedding(time) + projection(z))
        x += gate(vector) * mlp(norm(x) (1 + scale(vector)) + shift(vector))         in every block

    Tokens never see each other here; all that they share came with `z`. Shifts, scales, gates and the output start at
    zero.

    Args:
        dim: Numbers in one token.
        output_dim: Numbers that the process asks for.
        z_dim: Length of the transformer's vectors.
        width: Numbers in a token inside.
        depth: Blocks.
    """

    def __init__(self, dim: int, output_dim: int, z_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(dim, width)
        self.time_embedding = TimestepEmbedding(width)
        self.projection = nn.Linear(z_dim, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.to_output = nn.Linear(width, output_dim)
        self._start()

    def forward(
        self, noisy: Float[Tensor, "n dim"], time: Float[Tensor, " n"], z: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n out"]:
        """Return what the process asks the network for.

        Args:
            noisy: Noisy tokens, of any images.
            time: As `Process.network_time` gives it.
            z: The transformer's vector for each token.

        Returns:
            Velocity, noise or clean tokens, with a learned variance beside it if the process has one.
        """
        hidden = self.to_hidden(noisy.to(self.to_hidden.weight.dtype))
        vector = nn.functional.silu(self.time_embedding(time) + self.projection(z))
        for block in self.blocks:
            hidden = block(hidden, vector)
        shift, scale = self.final_modulation(vector).chunk(2, dim=-1)
        return self.to_output(self.final_norm(hidden) * (1 + scale) + shift)

    def _start(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.time_embedding.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.modules():
            if isinstance(block, HeadBlock):
                nn.init.zeros_(block.modulation.weight)  # so that every block starts as the identity
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.to_output.weight)


class HeadBlock(nn.Module):
    """An MLP with one hidden layer of the same width, with its shift, scale and gate.

    Args:
        width: Numbers in a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Float[Tensor, "n width"], vector: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """Return the tokens, changed; `vector` is SiLU(time + z)."""
        shift, scale, gate = self.modulation(vector).chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)
