"""Rows of one call that belong to trajectories of their own: `specdiff.rows`."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.blocks.row_batch import bucket
from specdiff.runtime.blocks.row_parts import joined, taken
from specdiff.runtime.streams.budget import held_bytes
from tests.runtime.blocks.test_whole_steps import Denoiser

PARTS = ("latent", "now", "condition")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Velocity(Denoiser):
    """A velocity [B, 6, 8] of all that it is given, and how many rows each call computed."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.batches.append(len(hidden_states))
        return self.velocity(hidden_states, timestep, condition)


class MixedRows(Velocity):
    """One whose rows depend on each other."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        own = super().forward(hidden_states, timestep, condition)
        return own + 0.1 * hidden_states.mean(0, keepdim=True)


class Listed(Velocity):
    """One that takes and returns a list of latents, in a dict."""

    def forward(self, x: list[Tensor], timestep: Tensor, condition: Tensor) -> Any:
        return {"sample": list(super().forward(torch.stack(x), timestep, condition)), "none": None}


@dataclass
class Request:
    """One generation by Euler on a flow."""

    seed: int
    steps: int
    joins: int = 0
    """Tick of its first evaluation."""
    quality: str = "balanced"
    shift: float = 3.0
    rows: int = 1
    tokens: int = 6

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(1, self.tokens, 8, generator=generator)
        self.latent = start.expand(self.rows, self.tokens, 8).clone()
        self.condition = torch.randn(self.rows, 1, 8, generator=generator)
        even = torch.linspace(1, 0, self.steps + 1)
        self.times = self.shift * even / (1 + (self.shift - 1) * even)
        self.done = 0

    def session(self, model: nn.Module, **options: Any) -> specdiff.Session:
        times = self.times[:-1]
        return specdiff.session(model, timesteps=times, quality=self.quality, **options)

    @property
    def now(self) -> Tensor:
        return self.times[self.done].expand(self.rows)

    def step(self, velocity: Tensor) -> None:
        if self.rows == 2:  # guided
            velocity = velocity[:1] + 3 * (velocity[1:] - velocity[:1])
        self.move(velocity)
        self.done += 1

    def move(self, velocity: Tensor) -> None:
        self.latent = self.latent + self.length(self.done) * velocity

    def length(self, step: int) -> Tensor:
        return self.times[step + 1] - self.times[step]


class Multistep(Request):
    """By the second order of Adams and Bashforth, on an uneven grid."""

    before: Tensor | None = None

    def move(self, velocity: Tensor) -> None:
        led = velocity
        if self.before is not None:
            share = self.length(self.done) / (2 * self.length(self.done - 1))
            led = velocity + share * (velocity - self.before)
        self.before = velocity
        super().move(led)


class Heun(Request):
    """Two evaluations a step, but for the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times = self.times.repeat_interleave(2)[1:-1]
        self.times = torch.cat([self.times[:-2], self.times[-1:]])
        self.steps = len(self.times) - 1

    def move(self, velocity: Tensor) -> None:
        if self.done % 2 == 0:
            self.start, self.first = self.latent, velocity
            super().move(velocity)
        else:
            mean = (self.first + velocity) / 2
            self.latent = self.start + self.length(self.done - 1) * mean


def requests() -> list[Request]:
    return [
        Request(1, 28),
        Request(2, 20, joins=3, quality="fast"),
        Request(3, 28, joins=7, shift=1.0),
        Request(4, 24, joins=9, quality="near-lossless"),
        Request(5, 12, joins=12, quality="dense"),
        Request(6, 28, joins=20),
    ]


@torch.no_grad()
def alone(model: nn.Module, request: Request, **options: Any) -> list[str]:
    """Draw one by itself; the kinds of its steps."""
    with request.session(model, **options), specdiff.record(model) as recording:
        while request.done < request.steps:
            request.step(model(request.latent, request.now, request.condition))
    return [step.kind for step in recording.steps]


@torch.no_grad()
def batched(model: nn.Module, waiting: list[Request], **options: Any) -> list[list[str]]:
    """Draw all in one batch that they join and leave; the kinds of the steps of each."""
    sessions = {id(each): each.session(model, **options) for each in waiting}
    kinds: dict[int, list[str]] = {id(each): [] for each in waiting}
    tick = 0
    while any(each.done < each.steps for each in waiting):
        running = [each for each in waiting if each.joins <= tick and each.done < each.steps]
        tick += 1
        if not running:
            continue
        running = running[tick % len(running) :] + running[: tick % len(running)]
        for size in dict.fromkeys(each.tokens for each in running):
            together = [each for each in running if each.tokens == size]
            for each, kind in zip(together, stepped(model, together, sessions), strict=True):
                kinds[id(each)].append(kind)
    return [kinds[id(each)] for each in waiting]


def stepped(
    model: nn.Module, together: list[Request], sessions: dict[int, specdiff.Session]
) -> list[str]:
    """A step of requests of one size, in one call; the kinds of their steps."""
    named = [sessions[id(each)] for each in together for _ in range(each.rows)]
    with specdiff.rows(model, named), specdiff.record(model) as recording:
        velocities = model(*[torch.cat([getattr(each, p) for each in together]) for p in PARTS])
    parts = velocities.split([each.rows for each in together])
    for each, velocity in zip(together, parts, strict=True):
        each.step(velocity)
    return [step.kind for step in recording.steps]


def test_rows_take_the_decisions_and_values_that_they_take_alone():
    model = Velocity()
    specdiff.attach(model)

    def drawn() -> list[Request]:
        others = [Multistep(7, 26, joins=2), Heun(8, 16, joins=5, tokens=10)]
        return [*requests(), *others, Request(9, 28, joins=6, tokens=10)]

    apart, together = drawn(), drawn()
    kinds = [alone(model, each) for each in apart]
    assert batched(model, together) == kinds
    assert sum(each.count("skipped") for each in kinds) > 80
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(other.latent, one.latent, **CLOSE)


def test_rows_that_skip_leave_the_batch():
    """The model computes the rows that are due, padded to one of a few sizes, and one look more."""
    model = Velocity()
    specdiff.attach(model)
    kinds = [alone(model, each) for each in requests()]
    due = sum(each.count("dense") + each.count("fallback") for each in kinds)
    model.batches.clear()
    batched(model, requests())
    assert due <= sum(model.batches) < 1.6 * due
    assert set(model.batches) <= {1, 2, 3, 4, 5, 6}


@pytest.mark.slow  # 20 s: the same of 64
def test_64_requests():
    model = Velocity()
    specdiff.attach(model)
    qualities = ("fast", "balanced", "near-lossless", "dense")
    samplers = (Request, Multistep, Heun)

    def drawn() -> list[Request]:
        return [
            samplers[i % 5 % 3](
                i, 10 + i % 23, i * 7 % 40, qualities[i % 4], 1.0 + i % 3, 1 + i % 2, 6 + i % 3
            )
            for i in range(64)
        ]

    apart, together = drawn(), drawn()
    assert batched(model, together) == [alone(model, each) for each in apart]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(other.latent, one.latent, **CLOSE)


def test_halves_of_guidance_are_rows_of_one_session():
    model = Velocity()
    specdiff.attach(model)
    apart = [Request(1, 28, rows=2), Request(2, 28, joins=5, rows=2)]
    together = [Request(1, 28, rows=2), Request(2, 28, joins=5, rows=2)]
    kinds = [alone(model, each, guidance_scale=3.0) for each in apart]
    assert batched(model, together, guidance_scale=3.0) == kinds
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(other.latent, one.latent, **CLOSE)


def test_rows_that_depend_on_each_other_are_computed_together(caplog):
    model = MixedRows()
    specdiff.attach(model, plan=Plan.every(2, warmup=2), cache_ratio=1.0)
    batched(model, [Request(1, 13), Request(2, 12, joins=1)])  # they take turns to be due
    assert "depend on each other" in caplog.text
    first, *later = model.batches
    assert (first, later.count(1)) == (1, 1)  # alone at first, and looked at alone once
    assert later.count(2) >= 10


def test_inputs_may_be_overwritten_after_the_call():
    model = Velocity()
    specdiff.attach(model)
    expected = Request(1, 28)
    alone(model, expected)
    request, buffers = Request(1, 28), [torch.zeros(2, 6, 8), torch.zeros(2), torch.zeros(2, 1, 8)]
    session, other = request.session(model), Request(2, 28)
    beside = other.session(model)
    with torch.no_grad():
        while request.done < request.steps:
            for row, each in enumerate((request, other)):
                buffers[0][row] = each.latent[0]
                buffers[1][row] = each.now[0]
                buffers[2][row] = each.condition[0]
            with specdiff.rows(model, [session, beside]):
                velocity = model(*buffers)
            request.step(velocity[:1].clone())
            other.step(velocity[1:].clone())
            for buffer in (*buffers, velocity):
                buffer.fill_(7.0)
    torch.testing.assert_close(request.latent, expected.latent, **CLOSE)


def test_lists_of_latents_and_outputs_in_dicts():
    model, request, other = Listed(), Request(1, 28), Request(2, 28)
    plain = Listed()
    expected = Request(1, 28)
    with torch.no_grad():
        for _ in range(28):
            latent, now, condition = expected.latent, expected.now, expected.condition
            expected.step(plain([latent[0]], now, condition)["sample"][0][None])
        specdiff.attach(model)
        sessions = [request.session(model), other.session(model)]
        for _ in range(28):
            with specdiff.rows(model, sessions):
                output = model(
                    [request.latent[0], other.latent[0]],
                    torch.cat([request.now, other.now]),
                    torch.cat([request.condition, other.condition]),
                )
            assert output["none"] is None
            request.step(output["sample"][0][None])
            other.step(output["sample"][1][None])
    assert specdiff.stats(model).skipped > 28
    assert ((request.latent - expected.latent).norm() / expected.latent.norm()).item() < 5e-3


def test_compiled_inside():
    """By specdiff itself: its graph answers as it came."""
    torch._dynamo.reset()
    model = Velocity()
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    specdiff.attach(model)
    apart, together = requests()[:3], requests()[:3]
    for each in apart:
        alone(model, each)
    batched(model, together)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(other.latent, one.latent, **CLOSE)


def test_a_call_that_failed_may_be_repeated():
    model = Velocity()
    specdiff.attach(model)
    expected = Request(1, 28)
    kinds = alone(model, expected)
    request = Request(1, 28)
    session = request.session(model)
    broken = {0, 1, 5, 11}

    def fail(*_: object) -> None:
        if broken and request.done == min(broken):
            broken.remove(min(broken))
            raise MemoryError("out of memory")

    model.mix.register_forward_pre_hook(fail)
    with torch.no_grad(), specdiff.record(model) as recording:
        while request.done < request.steps:
            try:
                with specdiff.rows(model, [session]):
                    velocity = model(request.latent, request.now, request.condition)
            except MemoryError:
                continue
            request.step(velocity)
    assert [step.kind for step in recording.steps] == kinds
    torch.testing.assert_close(request.latent, expected.latent, **CLOSE)


def test_a_request_that_is_dropped_leaves_nothing_behind():
    model = Velocity()
    specdiff.attach(model)
    request, other = Request(1, 28), Request(2, 28)
    session, beside = request.session(model), other.session(model)
    with torch.no_grad(), specdiff.rows(model, [session, beside]):
        for _ in range(3):
            model(
                torch.cat([request.latent, other.latent]),
                torch.cat([request.now, other.now]),
                torch.cat([request.condition, other.condition]),
            )
            request.done += 1
            other.done += 1
    dropped = weakref.ref(session)
    del session
    gc.collect()
    assert dropped() is None


def test_over_budget_the_oldest_gives_way():
    """Its next step is dense, and so are later ones until others have made room."""
    model = Velocity()
    specdiff.attach(model)
    exact = requests()[:3]
    for each in exact:
        each.quality = "dense"
        alone(model, each)
    free = batched(model, requests()[:3])
    first = Request(1, 28)
    with torch.no_grad(), first.session(model) as session:
        model(first.latent, first.now, first.condition)
        kept = held_bytes(*session.streams())
    del session
    specdiff.configure(model, max_cache_bytes=12 * kept)  # not enough for three
    specdiff.reset(model)
    drawn = requests()[:3]
    kinds = batched(model, drawn)
    assert specdiff.stats(model).fallbacks["cache budget exceeded"] > 3
    assert kinds[-1] == free[-1]  # the youngest was never in need
    assert kinds[0].count("dense") > free[0].count("dense")
    for one, expected in zip(drawn, exact, strict=True):
        assert (one.latent - expected.latent).norm() < 0.02 * expected.latent.norm()
    specdiff.configure(model, max_cache_bytes=0)
    (all_dense,) = batched(model, [Request(1, 28)])
    assert all_dense == ["dense"] * 28


def test_what_rows_keep_is_told_as_the_budget_counts_it():
    model = Velocity()
    specdiff.attach(model)
    some = requests()[:2]
    sessions = {id(each): each.session(model) for each in some}
    with torch.no_grad():
        for _ in range(2):  # what the first evaluations show is kept beside what they gave
            stepped(model, some, sessions)
        kept = sum(held_bytes(s) for each in sessions.values() for s in each.streams())
        assert specdiff.stats(model).kept_bytes == kept > 0
        specdiff.configure(model, max_cache_bytes=kept)
        stepped(model, some, sessions)
    assert 0 < specdiff.stats(model).kept_bytes <= kept
    specdiff.reset(model)
    assert specdiff.stats(model).kept_bytes == 0


def test_rows_and_sessions_have_to_fit():
    model, stranger = Velocity(), Velocity()
    specdiff.attach(model)
    request = Request(1, 28)
    session = request.session(model)
    with pytest.raises(specdiff.OptionError, match="one session for each row"):
        specdiff.rows(model, [])
    with pytest.raises(specdiff.OptionError, match="item 1 is no session of this model"):
        specdiff.rows(model, [session, request.session(stranger)])
    with (
        torch.no_grad(),
        specdiff.rows(model, [session] * 3),
        pytest.raises(specdiff.OptionError, match=r"3 sessions, but no input has as many rows"),
    ):
        model(request.latent, request.now, request.condition)


def test_a_model_that_is_not_attached_says_how():
    model, request = Velocity(), Request(1, 28)
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    with torch.no_grad(), specdiff.rows(model, [request.session(model)]):
        model(request.latent, request.now, request.condition)
    (reason,) = specdiff.stats(model).fallbacks
    assert "specdiff.attach(model)" in reason


class SharedFirst(Velocity):
    """One whose first argument all rows share."""

    def forward(self, condition: Tensor, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, condition)


@torch.no_grad()
@pytest.mark.parametrize("quality", ["balanced", "dense"])
def test_an_input_that_all_rows_share_does_not_give_them_one_output(quality):
    model, plain = SharedFirst(), SharedFirst()
    specdiff.attach(model)
    drawn = [Request(seed, 28, quality=quality) for seed in range(3)]
    sessions = [each.session(model) for each in drawn]
    shared = drawn[0].condition
    for _ in range(2):  # the first steps are dense
        latents, times = (torch.cat([getattr(r, name) for r in drawn]) for name in PARTS[:2])
        with specdiff.rows(model, sessions):
            found = model(shared, latents, times)
        torch.testing.assert_close(found, plain(shared, latents, times), rtol=0.05, atol=0.05)
        for each in drawn:
            each.done += 1
    assert len(model.batches) <= 4


class WithIds(Velocity):
    """One that takes a table shared by all rows, [4, 3]."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, ids: Tensor
    ) -> Tensor:
        shift = ids.reshape(2, 2, 3).sum()  # fails on a part of it
        return super().forward(hidden_states, timestep, condition) + 0.01 * shift


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 4])
def test_a_shared_input_with_as_many_entries_as_rows_is_not_cut(rows, caplog):
    model, plain, ids = WithIds(), WithIds(), torch.ones(4, 3)
    specdiff.attach(model)
    drawn, exact = ([Request(seed, 28) for seed in range(rows)] for _ in range(2))
    sessions = [each.session(model) for each in drawn]
    for _ in range(28):
        with specdiff.rows(model, sessions):
            found = model(*[torch.cat([getattr(r, name) for r in drawn]) for name in PARTS], ids)
        for each, velocity in zip(drawn, found.split(1), strict=True):
            each.step(velocity)
        for each in exact:
            each.step(plain(each.latent, each.now, each.condition, ids))
    for one, other in zip(drawn, exact, strict=True):
        assert ((one.latent - other.latent).norm() / other.latent.norm()).item() < 2e-2
    assert specdiff.stats(model).skipped > 9 * rows
    assert ("depend on each other" in caplog.text) == (rows == 4)


class Nameless(Velocity):
    """One without a time that could be known as such."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)


@torch.no_grad()
def test_a_model_that_is_refused_runs_once_a_call_and_says_so_once(caplog):
    model, drawn = Nameless(), [Request(seed, 28) for seed in range(2)]
    specdiff.attach(model)
    sessions = [each.session(model) for each in drawn]
    call = [torch.cat([getattr(each, name) for each in drawn]) for name in PARTS]
    for _ in range(6):
        with specdiff.rows(model, sessions):
            model(*call)
    assert len(model.batches) <= 7 and set(model.batches) == {2}
    assert caplog.text.count("attached model runs dense") == 1


@torch.no_grad()
def test_the_innermost_of_rows_and_sessions_counts():
    model, drawn = Velocity(), [Request(seed, 28) for seed in range(3)]
    specdiff.attach(model)
    sessions = [each.session(model) for each in drawn[:2]]
    with specdiff.rows(model, sessions), drawn[2].session(model):
        model(drawn[2].latent, drawn[2].now, drawn[2].condition)
    with drawn[2].session(model), specdiff.rows(model, sessions):
        model(*[torch.cat([getattr(each, name) for each in drawn[:2]]) for name in PARTS])


def test_parts_of_calls():
    value = {"x": torch.arange(8.0).reshape(4, 2), "many": [torch.zeros(1)] * 4, "one": (None, 3)}
    part = taken(value, [2, 0], 4)
    assert part["x"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert len(part["many"]) == 2 and part["one"] == (None, 3)
    parts = [taken(value, rows, 4) for rows in ([2, 0], [3, 1])]
    whole = joined(parts, [[2, 0], [3, 1]], 4)
    assert torch.equal(whole["x"], value["x"]) and len(whole["many"]) == 4


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (2, 2), (3, 3), (5, 6), (6, 6), (7, 8), (9, 10), (10, 10)]
)
def test_buckets(rows, size):
    assert bucket(rows, 10) == size
