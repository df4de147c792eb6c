"""Search the places of so many evaluations for `target="solution"`, on all models at once.

A plan is judged by how much closer to the solution its pictures are than the first plan's: half
the mean and half the lowest, added up over the models. The search moves an evaluation or two at a
time; the pictures are none of those that `solution.py` measures.

    python examples/research/placing.py 15 --pictures 4 --minutes 60
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from solution import MODELS, OURS, STEPS, Drawer

from specdiff.measure.comparison import psnr
from specdiff.plan import Plan

HOPELESS = -0.6
"""dB behind the best plan, by pictures so far, at which a plan is given up."""
Places = frozenset[int]


class Judge:
    """Draws pictures by plans, and compares them with their solutions."""

    def __init__(self, models: list[str], pictures: int, references: Path) -> None:
        self.drawers = {model: Drawer(model, eager=True) for model in models}
        self.tasks = [(model, -1 - i) for i in range(pictures) for model in models]
        self.references = references

    def __call__(self, places: Places, best: list[float] | None = None) -> list[float]:
        """PSNR of each picture; fewer where it falls behind the best plan's."""
        plan = Plan.of(STEPS, tuple(sorted(places)))
        found: list[float] = []
        for model, index in self.tasks:
            drawer = self.drawers[model]
            picture = drawer.draw(index, "solution", plan)
            found.append(psnr(picture, drawer.exact(index, self.references)))
            if best and sum(found) - sum(best[: len(found)]) < HOPELESS * len(self.drawers):
                break
        return found

    def worth(self, found: list[float]) -> float:
        """Half the mean and half the lowest, added up over the models; the least if given up."""
        count = len(self.drawers)
        if len(found) < len(self.tasks):
            return float("-inf")
        rows = [found[at::count] for at in range(count)]
        return sum((statistics.fmean(row) + min(row)) / 2 for row in rows)


def neighbour(places: Places, chance: random.Random) -> Places:
    """One or two evaluations elsewhere; the first stays."""
    found = set(places)
    for _ in range(chance.choice((1, 1, 2))):
        leaves = chance.choice(sorted(found - {0}))
        near = chance.random() < 0.7
        comes = leaves + chance.choice((-2, -1, 1, 2)) if near else chance.randrange(1, STEPS)
        if 0 < comes < STEPS and comes not in found:
            found = found - {leaves} | {comes}
    return frozenset(found)


def starts(count: int) -> list[Places]:
    """Today's plan, and even steps of as many evaluations."""
    even = frozenset(round(STEPS * i / count) for i in range(count))
    late = frozenset(round((STEPS - 1) * i / (count - 1)) for i in range(count))
    today = [frozenset(OURS[count].dense)] if count in OURS else []
    return [*today, even, late]


def search(judge: Judge, count: int, until: float) -> None:
    """Print each plan that is better than all before."""
    chance = random.Random(0)
    waiting, seen = starts(count), set[Places]()
    best, worth = waiting[0], float("-inf")
    kept: list[float] | None = None
    while time.monotonic() < until:
        places = waiting.pop(0) if waiting else neighbour(best, chance)
        if places in seen:
            continue
        seen.add(places)
        found = judge(places, None if waiting or kept is None else kept)
        value = judge.worth(found)
        if value > worth:
            best, worth, kept = places, value, found
            row = " ".join(f"{one:.1f}" for one in found)
            print(f"{value:.2f} {sorted(best)} ({len(seen)} seen): {row}", flush=True)


def main() -> None:
    """Search until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", type=int)
    parser.add_argument("--pictures", type=int, default=4, help="of each model")
    parser.add_argument("--model", choices=[*MODELS], nargs="*", default=["emoji", "textures"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--references", type=Path, default=Path("placing-references"))
    wanted = parser.parse_args()
    torch.set_grad_enabled(False)
    judge = Judge(wanted.model, wanted.pictures, wanted.references)
    search(judge, wanted.evaluations, time.monotonic() + 60 * wanted.minutes)


if __name__ == "__main__":
    main()
