"""Calls made one and taken apart again."""

from __future__ import annotations

import pytest
import torch

from specdiff.serve.joining import call_of, joinable, joined, parted


def flux_call(rows: int, tokens: int = 16, time: float = 0.5) -> dict:
    return {
        "hidden_states": torch.randn(rows, tokens, 4),
        "timestep": torch.full((rows,), time),
        "guidance": None,
        "img_ids": torch.zeros(tokens, 3),
        "return_dict": False,
    }


def test_rows_are_joined_and_what_is_equal_is_kept() -> None:
    one, other = flux_call(2), flux_call(1, time=0.25)
    calls = [call_of((), one), call_of((), other)]
    assert [call.rows for call in calls] == [2, 1]
    assert joinable(*calls)
    args, kwargs = joined(calls)
    assert args == ()
    assert torch.equal(kwargs["hidden_states"][2:], other["hidden_states"])
    assert kwargs["timestep"].tolist() == [0.5, 0.5, 0.25]
    assert kwargs["img_ids"] is one["img_ids"]
    assert kwargs["guidance"] is None
    first, second = parted((kwargs["hidden_states"],), [2, 1])
    assert torch.equal(first[0], one["hidden_states"])
    assert torch.equal(second[0], other["hidden_states"])


def test_one_time_for_all_rows_becomes_one_for_each() -> None:
    sample = torch.randn(2, 4, 8, 8)
    calls = [call_of((sample, torch.tensor(time)), {}) for time in (7, 3)]
    args, _ = joined(calls)
    assert args[1].tolist() == [7, 7, 3, 3]
    assert joined(calls[:1])[0][1].ndim == 0


def test_lists_with_an_entry_for_each_row_are_joined() -> None:
    calls = [call_of(([torch.randn(4, 8, 8)], torch.tensor([time])), {}) for time in (7.0, 3.0)]
    assert joinable(*calls)
    args, _ = joined(calls)
    assert len(args[0]) == 2
    assert args[1].tolist() == [7.0, 3.0]
    assert [len(part[0]) for part in parted((args[0],), [1, 1])] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_states": torch.randn(1, 25, 4), "img_ids": torch.zeros(25, 3)},
        {"img_ids": torch.ones(16, 3)},
        {"return_dict": True},
        {"guidance": torch.ones(1)},
        {"hidden_states": torch.randn(1, 16, 4).half()},
        {"more": 1},
    ],
)
def test_calls_that_differ_are_not_joined(change: dict) -> None:
    assert not joinable(call_of((), flux_call(1)), call_of((), {**flux_call(1), **change}))
