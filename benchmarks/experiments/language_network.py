"""A small transformer decoder, of the usual parts: pre-norm, learned positions, tied embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each on its normalised input, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        projected = self.queries_keys_values(self.before_attention(x)).view(shape)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Transformer(nn.Module):
    """Logits of the character after each of [batch, length], as [batch, length, characters]."""

    def __init__(
        self, characters: int, *, context: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.position.weight[: characters.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices decay, the gains of the norms do not."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]


@torch.no_grad()
def mean_loss(model: nn.Module, part: Tensor, context: int, share: float = 1.0) -> float:
    """Mean negative log-likelihood of a text's characters [nats per character].

    The text is read in contexts that lie end to end, so each character but the first (and what
    is left over at the end) is said once, from those before it in its own context.

    Args:
      model: gives logits.
      part: the text, int64 [n].
      context: the length of a context [characters].
      share: how much of the text, from its beginning, is read (0, 1].
    """
    count = int((len(part) - 1) * share) // context
    inputs = part[: count * context].view(count, context)
    targets = part[1 : count * context + 1].view(count, context)
    total = 0.0
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (count * context)
