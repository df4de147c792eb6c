"""Tables by timestep over generations: filled rarely, and every step has the values of its time."""

from __future__ import annotations

import pytest
import torch

import specdiff
from specdiff.bench.measure import TimedPrograms
from specdiff.plan import Plan
from specdiff.program import TIMES_AT_ONCE
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.streams.registry import find_or_create
from specdiff.runtime.streams.time_tables import MOST_KNOWN, KnownTimes
from tests.models import ZOO
from tests.oracles import small_tables

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SIGMAS = (1.0, 0.95, 0.9, 0.75, 0.5, 0.3, 0.2)
OTHERS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1)
HEUN = (1.0, 0.92, 0.92, 0.82, 0.82, 0.52, 0.52, 0.22)
MANY = tuple(1 - i / 40 for i in range(2 * TIMES_AT_ONCE + 6))


class EachAnew(TimedPrograms):
    """Programs that compute what tables hold in every step, from its own inputs."""

    def tabulate(self, inputs, caches, later=()):
        pass

    def selective(self, *wanted, row=None, **options):
        return super().selective(*wanted, **options)


def expanded(sigma):
    """One number for both rows, as pipelines make it."""
    return torch.tensor(sigma).expand(2)


class Sampled:
    """A small FLUX, most of whose steps select tokens; `time` makes its time input."""

    def __init__(self, time=expanded, case=None) -> None:
        self.time = time
        case = case or ZOO["flux_guidance"]()
        self.inputs = {k: v for k, v in case.inputs.items() if k != "timestep"}
        options = {"inner_backend": "eager", "method": "paper", "cache_ratio": 0.5}
        self.model = case.model
        self.compiled = torch.compile(case.model, backend="specdiff", options=options)
        with small_tables():
            self.generation(SIGMAS)
        (self.runtime,) = find_or_create(self.compiled).graphs
        assert isinstance(self.runtime, Runtime)
        assert self.runtime.programs.signature.tabulated_from is not None
        self.programs = self.runtime.programs

    def generation(self, sigmas, given=False, guidance=None, before=None, **conditions):
        """All outputs of one generation.

        `guidance` makes that of each step; `before` is called first.
        """
        inputs = {**self.inputs, **conditions}
        outputs = []
        session = specdiff.session(self.compiled, timesteps=sigmas if given else None)
        with torch.no_grad(), session:
            for step, sigma in enumerate(sigmas):
                if guidance is not None:
                    inputs["guidance"] = guidance(step)
                if before is not None:
                    before(step)
                velocity = self.compiled(**inputs, timestep=self.time(sigma))[0]
                outputs.append(velocity)
                inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * velocity
        return torch.stack(outputs)

    def check(self, filled=None, sigmas=SIGMAS, **wanted):
        """A generation looks up what each step would compute, in tables filled so often.

        Or, if nothing is said, filled in each step.
        """
        watched = self.runtime.programs = TimedPrograms(self.programs)
        before = specdiff.stats(self.compiled).selective
        outputs = self.generation(sigmas, **wanted)
        selective = specdiff.stats(self.compiled).selective - before
        assert selective >= 3
        counts = [len(watched.seconds[name]) for name in ("timetable", "timetable_row")]
        assert counts == filled or sum(counts) == (filled or selective)
        self.runtime.programs = EachAnew(self.programs)
        expected = self.generation(sigmas, **wanted)
        torch.testing.assert_close(outputs, expected, **TOLERANCE)
        return outputs


@pytest.fixture
def sampled():
    """It has run `SIGMAS` once."""
    return Sampled()


@pytest.mark.parametrize(
    "given",
    [pytest.param(False, marks=pytest.mark.slow, id="read"), pytest.param(True, id="given")],
)
def test_tables_are_filled_step_by_step_and_then_once_a_generation(sampled, given):
    sigmas = (1.0, 0.97, 0.91, 0.77, 0.43, 0.31, 0.11)  # it has not run them
    sampled.check(sigmas=sigmas, given=given)
    sampled.check([1, 0], sigmas=sigmas, given=given)
    sampled.check([1, 0], sigmas=sigmas, given=given)


def test_times_of_each_token_are_never_taken_from_earlier_generations():
    """A session's times say nothing of what each frame or token is given."""
    case = ZOO["sana_wm_ltx2_refiner_transformer"]()
    times = case.inputs.pop("timestep")
    assert times.numel() > 2
    sampled = Sampled(lambda sigma: sigma * torch.ones_like(times), case)
    sampled.check(given=True)
    sampled.time = lambda sigma: sigma * torch.linspace(0, 1, times.shape[1]).expand(times.shape)
    sampled.check(given=True)


def test_a_broken_promise_is_not_a_picture(sampled):
    """Given the same times, the model was called with others than in the generation before."""
    sampled.generation(SIGMAS, given=True)
    sampled.time = lambda sigma: expanded(sigma / 2)
    assert sampled.generation(SIGMAS, given=True)[-1].isnan().all()
    assert sampled.generation(SIGMAS, given=True).isfinite().all()  # the times that are kept now


@pytest.mark.slow
def test_reset_forgets_times(sampled):
    sampled.generation(SIGMAS, given=True)
    specdiff.reset(sampled.compiled)
    sampled.time = lambda sigma: expanded(sigma / 2)
    assert sampled.generation(SIGMAS, given=True).isfinite().all()


@pytest.mark.slow
def test_other_conditions_have_tables_of_their_own(sampled):
    first = sampled.check(1)
    second = sampled.check(1, pooled_projections=torch.randn(2, 20))
    assert not torch.allclose(first, second, **TOLERANCE)
    sampled.check(1)


@pytest.mark.slow
def test_other_times_are_never_looked_up(sampled):
    sampled.check(sigmas=OTHERS)
    for sigmas in (OTHERS, SIGMAS, OTHERS):
        sampled.check(1, sigmas=sigmas)
    # the first half of one and the second half of the other
    sampled.check(2, sigmas=(*SIGMAS[:4], *OTHERS[4:]))


@pytest.mark.slow
def test_a_repeated_time_has_one_row(sampled):
    sampled.check(3, sigmas=HEUN)  # 0.92, 0.82 and 0.52; the last step is dense
    sampled.check(1, sigmas=HEUN)


@pytest.mark.slow
def test_more_times_than_rows(sampled):
    sampled.check(sigmas=MANY)
    sampled.check(3, sigmas=MANY)


@pytest.mark.slow
def test_guidance_made_anew_is_compared_by_value(sampled):
    def anew(step):
        return torch.full((2,), 3.5)

    sampled.check([1, 0], guidance=anew)
    sampled.check(given=True, guidance=anew)
    sampled.check([1, 3], given=True, guidance=anew)  # where nothing is read, it may be another


def test_guidance_that_changes_is_heeded(sampled):
    constant = sampled.check([1, 0])
    changing = sampled.check([1, 3], guidance=lambda step: torch.full((2,), 3.5 + step))
    assert not torch.allclose(constant, changing, **TOLERANCE)
    in_place = torch.full((2,), 3.5)
    written = sampled.check([1, 3], guidance=lambda step: in_place.fill_(3.5 + step))
    torch.testing.assert_close(written, changing, **TOLERANCE)


@pytest.mark.slow
@torch.inference_mode()
def test_guidance_that_changes_unseen_is_heeded():
    """No version of an inference tensor tells of a write."""
    sampled, guidance = Sampled(), torch.full((2,), 3.5)
    sampled.check([1, 0], guidance=lambda step: guidance)
    sampled.check([1, 3], guidance=lambda step: guidance.fill_(3.5 + step))
    sampled.generation(SIGMAS, given=True, guidance=lambda step: guidance)
    sampled.check([1, 0], given=True, guidance=lambda step: guidance)
    outputs = sampled.generation(
        SIGMAS, given=True, guidance=lambda step: guidance.fill_(3.5 + step)
    )
    assert outputs[-1].isnan().all()  # rather than a picture of other guidance


@pytest.mark.slow
def test_tables_outlast_a_dense_step_unless_weights_have_changed(sampled):
    specdiff.configure(sampled.compiled, plan=Plan.every(3, warmup=3), cache_ratio=0.5)
    with specdiff.record(sampled.compiled) as recording:
        constant = sampled.check([1, 0])
    kinds = [step.kind for step in recording.steps]
    dense = kinds.index("dense", kinds.index("selective"))
    assert kinds[dense + 1] == "selective"
    weight = sampled.model.norm_out.linear.weight
    kept = weight.detach().clone()

    def fuse(step):
        if step in (0, dense):
            weight.copy_(1.5 * kept if step else kept)

    changed = sampled.check(2, before=fuse)
    assert torch.equal(changed[:dense], constant[:dense])
    assert not torch.allclose(changed[dense + 1], constant[dense + 1], **TOLERANCE)


def test_known_times_follow_one_another():
    known = KnownTimes()
    moments = [(None, 1.0 - i / 10) for i in range(5)]
    values = [torch.tensor(time) for _, time in moments]
    for previous, moment, value in zip([None, *moments], moments, values, strict=False):
        known.see(moment, value, previous)
    assert known.following(moments[1], 2) == dict(zip(moments[2:4], values[2:4], strict=True))
    assert [*known.following(moments[3], 9)] == moments[4:]
    assert known.following((None, 0.55), 9) == {}
    known.see((None, 0.55), values[0], moments[1])
    assert [*known.following(moments[1], 9)] == [(None, 0.55)]
    known.see(moments[0], values[0], moments[4])  # no circle is gone round twice
    assert [*known.following(moments[3], 9)] == [moments[4], *moments[:2], (None, 0.55)]
    assert [*known.following(moments[4], 9)] == [*moments[:2], (None, 0.55)]


def test_known_times_are_copies_and_few():
    known, value = KnownTimes(), torch.ones(1)
    known.see((None, 1.0), value, None)
    known.see((None, 2.0), value, (None, 1.0))
    value.zero_()
    assert known.following((None, 1.0), 1) == {(None, 2.0): torch.ones(1)}
    for i in range(2 * MOST_KNOWN):
        known.see((None, 2.0 + i), value, (None, 1.0 + i))
    assert len(known._inputs) <= MOST_KNOWN and len(known._next) <= MOST_KNOWN
