"""Contestants take turns, and only what they do is timed."""

from __future__ import annotations

import itertools

from specdiff.measure.timing import in_turns, timed


def test_only_the_work_is_timed() -> None:
    ticks = itertools.count(step=5)
    assert timed(lambda: "done", clock=lambda: float(next(ticks))) == ("done", 5.0)


def test_every_task_is_done_by_all_before_the_next() -> None:
    events: list[str] = []
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0])

    def run(one: str, task: int) -> str:
        events.append(f"{one}{task}")
        return events[-1]

    turns = in_turns(
        "ab", (1, 2), run, clock=lambda: next(ticks), before=lambda one, task: events.append(one)
    )
    assert list(turns) == [
        ("a", 1, "a1", 1.0),
        ("b", 1, "b1", 2.0),
        ("a", 2, "a2", 3.0),
        ("b", 2, "b2", 4.0),
    ]
    assert events == ["a", "a1", "b", "b1", "a", "a2", "b", "b2"]
