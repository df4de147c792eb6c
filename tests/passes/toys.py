"""Toy diffusion transformers: one attention block, with whatever is to be tested in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Inputs, randomize

TOKENS, TEXT, CHANNELS, HEADS, BATCH = 10, 3, 8, 2, 2
Middle = Callable[["Toy", Tensor], Tensor]


def attend(x: Tensor, heads: int = HEADS, **options: Any) -> Tensor:
    """Self-attention of `x` with itself, without projections."""
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(split, split, split, **options).transpose(1, 2).flatten(2)


class Toy(nn.Module):
    """embed, attention, `middle`, attention, head; text joins the attentions."""

    def __init__(self, middle: Middle, text: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(4, CHANNELS)
        self.embed_text = nn.Linear(5, CHANNELS)
        self.q, self.k, self.v, self.o = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.norm = nn.LayerNorm(CHANNELS)
        self.wide = nn.Linear(CHANNELS, 2 * CHANNELS)
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.table = nn.Parameter(torch.zeros(1, TOKENS, CHANNELS))
        self.head = nn.Linear(CHANNELS, 4)
        self.middle = middle
        self.text = text

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def attention(self, x: Tensor, **options: Any) -> Tensor:
        """Residual attention over the tokens of `x`."""
        y = self.norm(x)
        q, k, v = (self.heads(linear(y)) for linear in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, **options)
        return x + self.o(out.transpose(1, 2).flatten(2))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        if not self.text:
            return (self.head(self.attention(self.middle(self, self.attention(x)))),)
        joint = torch.cat([self.embed_text(encoder_hidden_states), x], 1)
        joint = self.attention(joint)
        x = self.middle(self, joint[:, TEXT:])
        joint = self.attention(torch.cat([joint[:, :TEXT], x], 1))
        return (self.head(joint[:, TEXT:]),)


def toy(middle: Middle, text: bool = True, batch: int = BATCH) -> tuple[nn.Module, Inputs]:
    """A randomized toy, and inputs for it."""
    torch.manual_seed(0)
    return randomize(Toy(middle, text)), toy_inputs(batch)


def toy_inputs(batch: int = BATCH) -> Inputs:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, TOKENS, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 5),
        "timestep": torch.full((batch,), 0.7),
    }
