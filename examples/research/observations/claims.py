"""The paper's observations as numbers, from records of dense runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .records import Record

BINS = 10


def top(scores: Tensor, share: float) -> Tensor:
    """Mask of the highest-scoring share of tokens `[N]`."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(max(1, round(share * len(scores)))).indices] = True
    return mask


def recall(scores: Tensor, truth: Tensor, share: float) -> float:
    """Share of the truly highest tokens that the scores find, both sets of the same size."""
    wanted = top(truth, share)
    return float((top(scores, share) & wanted).sum() / wanted.sum())


def future(record: Record, ahead: Record, step: int) -> Tensor:
    """Importance at the nearest speculative step that is not earlier; the last if none is left."""
    later = [i for i, time in enumerate(ahead.times) if time <= record.times[step] + 1e-6]
    return ahead.importance[later[0] if later else -1]


def recalls(record: Record, ahead: Record, share: float, age: int) -> dict[str, list[list[float]]]:
    """Figure 4: recall of the truly important tokens at each step, by what predicts them.

    Args:
        record: The dense run.
        ahead: The speculative run of few steps.
        share: Share of tokens that count as important.
        age: How many steps ago the history was written.

    Returns:
        For each notion of importance a list per predictor (history, future, both) over steps.
    """
    found: dict[str, list[list[float]]] = {}
    for step in range(max(age, 2), len(record.times)):
        truths = {
            "attention received": record.importance[step],
            "change of the output": (record.outputs[step] - record.outputs[step - 1]).norm(dim=-1),
        }
        past, coming = record.importance[step - age], future(record, ahead, step)
        for name, truth in truths.items():
            rows = found.setdefault(name, [[], [], []])
            for row, scores in zip(rows, (past, coming, past * coming), strict=True):
                row.append(recall(scores, truth, share))
    return found


def selections(counts: Tensor) -> dict[str, float]:
    """Figure 5a: how unevenly tokens were chosen, from `[N]` counts without the dense steps."""
    ordered = counts.double().flatten().sort(descending=True).values
    quarter = ordered[: len(ordered) // 4].sum() / ordered.sum().clamp_min(1)
    return {
        "top_quarter_share": float(quarter),
        "never_share": float((ordered == 0).double().mean()),
    }


def reuse_errors(records: Sequence[Record], aheads: Sequence[Record]) -> dict[str, list[float]]:
    """Figure 5b: error of reusing the last output, in `BINS` bins of rising score.

    Returns:
        Over tokens of a bin and steps: the mean error and its coefficient of variation; errors are
        relative to the mean error of their step, so that steps can be pooled.
    """
    bins: list[list[Tensor]] = [[] for _ in range(BINS)]
    for record, ahead in zip(records, aheads, strict=True):
        for step in range(1, len(record.times)):
            error = (record.outputs[step] - record.outputs[step - 1]).norm(dim=-1)
            score = record.importance[step - 1] * future(record, ahead, step)
            for index, chunk in enumerate(score.argsort().chunk(BINS)):
                bins[index].append(error[chunk] / error.mean())
    pooled = [torch.cat(one) for one in bins]
    return {
        "mean": [float(one.mean()) for one in pooled],
        "variation": [float(one.std() / one.mean()) for one in pooled],
    }


def similarities(record: Record) -> list[float]:
    """Figure 5c: mean cosine similarity of tokens' outputs with those of the step before."""
    pairs = functional.cosine_similarity(record.outputs[1:], record.outputs[:-1], dim=-1)
    return [float(value) for value in pairs.mean(-1)]


def same_time(record: Record, ahead: Record) -> list[tuple[float, float]]:
    """Similarity of a run of few steps with the dense one at the nearest time: (time, cosine)."""
    found = []
    for time, output in zip(ahead.times, ahead.outputs, strict=True):
        nearest = int((record.times - time).abs().argmin())
        cosine = functional.cosine_similarity(output, record.outputs[nearest], dim=-1).mean()
        found.append((float(time), float(cosine)))
    return found
