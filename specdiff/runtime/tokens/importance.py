"""Which tokens to compute: importance, scores, top-k, and the paper's class C2.

Scores are kept as logarithms: a starvation factor of exp(3 * 28) times a staleness and two
importances leaves float32, their sum of logarithms does not, and the order is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdiff.program import share_out
from specdiff.runtime.tokens.clock import distance
from specdiff.runtime.tokens.history import History
from specdiff.settings import Settings

Scorer = Callable[[Tensor, Tensor, History, float, float], Tensor]
"""(log his, log fut, history, time, starvation) -> log score, float32 [B, N]."""

SMALLEST = torch.finfo(torch.float32).tiny


def per_sample(importance: Tensor, shared: bool) -> Tensor:
    """Scale importance to mean 1 in every batch row; sum the halves of a guided batch.

    Args:
        importance: [B, N], attention received.
        shared: the batch is the two halves of classifier-free guidance.

    Returns:
        float32 [B, N], owned by the caller.
    """
    importance = importance.float()
    scaled = importance / importance.mean(1, keepdim=True).clamp_min(SMALLEST)
    if not shared:
        return scaled
    first, second = scaled.chunk(2)
    return ((first + second) / 2).repeat(2, 1)


def _paper(his: Tensor, fut: Tensor, history: History, time: float, starvation: float) -> Tensor:
    """Equation 3: his * fut * exp(starvation * cf)."""
    return his + fut + starvation * history.cached


def _history(his: Tensor, fut: Tensor, history: History, time: float, starvation: float) -> Tensor:
    """His * fut * exp(starvation * cf) * staleness^2 (docs/paper.md, at its end)."""
    ago = distance(history.computed[0].times, time)
    # The age keeps an order among tokens when neighbouring times are equal (Heun, bf16).
    staleness = ago + 1e-6 * (1 + history.age)
    return _paper(his, fut, history, time, starvation) + 2 * staleness.log()


SCORERS: dict[str, Scorer] = {"paper": _paper, "history": _history}


def log_scores(
    settings: Settings, his: Tensor, fut: Tensor | None, history: History, time: float
) -> Tensor:
    """Logarithm of every token's score, float32 [B, N]; `fut` None stands for ones."""
    log_his = his.clamp_min(SMALLEST).log()
    log_fut = torch.zeros_like(log_his) if fut is None else fut.clamp_min(SMALLEST).log()
    scorer = SCORERS[settings.method]
    return scorer(log_his, log_fut, history, time, settings.starvation)


def most_important(scores: Tensor, count: int, shared: bool, lengths: Sequence[int]) -> Tensor:
    """Class C1: the highest scores of each batch row and segment.

    Args:
        scores: float32 [B, N].
        count: K, at most N; each segment has its share of it.
        shared: both halves of the batch take the set of the first.
        lengths: of the segments, N together.

    Returns:
        int64 [B, K], ascending.
    """
    rows = scores.chunk(2)[0] if shared else scores
    columns, first = [], 0
    for length, share in zip(lengths, share_out(lengths, count), strict=True):
        best = rows[:, first : first + length].topk(share, dim=1, sorted=False).indices
        columns.append(best.sort(dim=1).values + first)
        first += length
    active = torch.cat(columns, 1)
    return active.repeat(2, 1) if shared else active


def least_important(scores: Tensor, share: float, active: Tensor) -> Tensor:
    """Class C2 (equation 5): the lowest scores that together hold `share` of the total.

    Args:
        scores: logarithms, float32 [B, N].
        share: from 0 to 1.
        active: int64 [B, K], never part of the class.

    Returns:
        bool [B, N].
    """
    shares, order = scores.softmax(1).sort(dim=1)
    members = torch.zeros_like(order, dtype=torch.bool)
    members = members.scatter(1, order, shares.cumsum(1) <= share)
    return members.scatter(1, active, False)
