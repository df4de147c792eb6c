"""Which calls belong together: interleaved, aborted, repeated and ambiguous generations, guards."""

import gc
import itertools

import pytest
import torch

import specdiff as sd
from specdiff.options import Options
from specdiff.plan import Plan
from specdiff.runtime.step.dense_only import DenseOnly
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.streams.caches import CachePool
from tests.helpers import PLAN, step_counts
from tests.runtime.toy import (
    UNCORRECTED,
    Euler,
    N,
    Toy,
    ToyPrograms,
    dense_velocity,
    noise,
    prompt,
    sigmas,
    streams_of,
    toy,
)

ALONE = (4, 6, 0)
"""Dense, selective and skipped evaluations of ten steps."""


def alone(seed, **options):
    """Velocities of a generation that has the model to itself."""
    return Euler(toy(**{**PLAN, **options}), seed).run().velocities


def test_two_prompts_interleaved():
    model = toy(**PLAN)
    runs = [Euler(model, 0), Euler(model, 1)]
    for _ in range(10):
        for run in runs:
            run.step()
    assert step_counts(model) == (8, 12, 0)
    for seed, run in enumerate(runs):
        torch.testing.assert_close(run.velocities, alone(seed), rtol=0, atol=0)
    assert sd.stats(model).cache_bytes == 2 * model.runtime.programs.signature.cache_bytes


@pytest.mark.parametrize("lead", [1, 2])
def test_two_seeds_at_times_of_their_own_on_one_prompt_tensor_run_dense(lead, caplog):
    """Undetectable by times alone: the latents tell. Side by side they are lanes (test_lanes)."""
    model = toy(**PLAN)
    text = prompt()
    runs = [Euler(model, 0, text=text), Euler(model, 1, text=text)]
    runs[0].run(lead)
    with caplog.at_level("WARNING"):
        for _ in range(6):
            for run in runs:
                run.step()
    assert max(max(run.errors) for run in runs) < 1e-6
    stats = sd.stats(model)
    assert stats.selective == 0
    # All but the evaluations that began the first generation and restarted it for the second.
    assert stats.fallbacks == {"ambiguous stream": lead + 12 - (lead + 2)}
    assert stats.dense == lead + 12
    assert caplog.messages.count("running dense: ambiguous stream") == 1
    assert not any(stream.selected.lease for stream in streams_of(model))
    sd.reset(model)
    Euler(model, 2, text=text).run()
    assert step_counts(model) == ALONE


def test_seeds_one_after_the_other_on_one_prompt_tensor():
    model = toy(**PLAN)
    text = prompt()
    for seed in range(3):
        run = Euler(model, seed, text=text).run()
        torch.testing.assert_close(
            run.velocities, Euler(toy(**PLAN), seed, text=text).run().velocities, rtol=0, atol=0
        )
    assert step_counts(model) == (12, 18, 0)
    assert sd.stats(model).cache_bytes == model.runtime.programs.signature.cache_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_two_models_take_turns_on_one_prompt_tensor(tied):
    """One callable serves both, as Dynamo does for two models of a class."""
    runtime = Runtime(ToyPrograms(), Options(**PLAN))
    models = [Toy(runtime, seed) for seed in range(2)]
    if tied:
        models[0].text = models[1].text
    text = prompt()
    runs = [Euler(model, 0, text=text) for model in models]
    for _ in range(10):
        for run in runs:
            run.step()
    for seed, (model, run) in enumerate(zip(models, runs, strict=True)):
        single = toy(seed, **PLAN)
        single.text = model.text
        expected = Euler(single, 0, text=text).run()
        torch.testing.assert_close(run.velocities, expected.velocities, rtol=0, atol=0)
        assert step_counts(model) == ALONE


def test_heun_repeats_times():
    model = toy(**PLAN)
    text, latent, times = prompt(), noise(), sigmas(6)
    for now, then in itertools.pairwise(times):
        first = model(latent, torch.tensor([now]), text)
        ahead = latent + (then - now) * first
        if then == 0:
            break
        second = model(ahead, torch.tensor([then]), text)
        assert second.isfinite().all()
        latent = latent + (then - now) * (first + second) / 2
    assert step_counts(model) == (5, 6, 0)
    assert sd.stats(model).fallbacks == {}
    assert sd.stats(model).speculative == 1


def test_colliding_bf16_times():
    """High shift: the first four times are 1.0 in bf16; the sampler goes on with exact ones."""
    model = toy(**{**PLAN, "plan": Plan.every(2, warmup=3)})
    run = Euler(model, dtype=torch.bfloat16)
    run.sigmas = [1.0, 0.9995, 0.999, 0.9985, 0.98, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    assert len({run.time(index).item() for index in range(4)}) == 1
    run.run()
    assert step_counts(model) == (6, 4, 0)
    assert sd.stats(model).fallbacks == {}
    assert all(v.isfinite().all() for v in run.velocities)
    assert max(run.errors) < 0.5


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("rising", [False, True])
def test_aborted_generation_leaves_nothing_behind(stop, rising):
    def as_time(sigma):
        return 1 - sigma if rising else sigma

    def compiled():
        return toy(programs=ToyPrograms(sign=-1.0, rising=rising), **PLAN)

    model, text = compiled(), prompt()
    Euler(model, 0, text=text, as_time=as_time).run(stop)
    sd.reset(model)
    Euler(model, 0, text=text, as_time=as_time).run(stop)
    run = Euler(model, 1, text=text, as_time=as_time).run()
    expected = Euler(compiled(), 1, text=text, as_time=as_time).run()
    torch.testing.assert_close(run.velocities, expected.velocities, rtol=0, atol=0)
    aborted = min(stop, 3), max(stop - 3, 0), 0
    assert step_counts(model) == tuple(a + b for a, b in zip(ALONE, aborted, strict=True))


def test_same_call_again_and_again_is_a_new_start_each_time():
    model = toy(**PLAN)
    run = Euler(model)
    for _ in range(5):
        model(run.latent, run.time(), run.prompt)
    assert model.runtime.programs.names() == ["scratch"] * 5
    assert sd.stats(model).cache_bytes == 0


def test_prompt_tensor_rewritten_in_place_is_another_key():
    model, text = toy(**PLAN), prompt()
    run = Euler(model, 0, text=text).run(5)
    text.copy_(prompt(1))
    run.run()
    assert run.errors[5] < 1e-6 < run.errors[7]
    assert step_counts(model) == (5, 5, 0)
    assert sd.stats(model).fallbacks == {"a condition changed": 1}


def test_prompt_tensor_given_other_data_is_another_key():
    model, text = toy(**PLAN), prompt()
    run = Euler(model, 0, text=text).run(5)
    text.data = prompt(1)
    run.run(3)
    assert run.errors[5] < 1e-6


def test_the_scratch_set_is_as_large_as_one_slot():
    signature = ToyPrograms().signature
    pool = CachePool(signature.caches)
    scratch = pool.scratch()
    assert [(s.shape, s.dtype) for s in scratch] == [(s.shape, s.dtype) for s in signature.caches]
    (storage,) = {tensor.untyped_storage() for tensor in scratch}
    assert storage.nbytes() == max(slot.nbytes for slot in signature.caches)
    assert pool.nbytes == 0
    assert all(a is b for a, b in zip(pool.scratch(), scratch, strict=True))  # as CUDA graphs need


def test_conditions_made_anew_at_every_call_are_one_generation():
    model = toy(**PLAN)
    run = Euler(model)
    for _ in range(10):
        run.prompt = run.prompt.clone()
        run.step()
    assert step_counts(model) == (4, 6, 0)
    assert len(streams_of(model)) == 1


def test_caches_of_dead_keys_serve_the_next():
    model = toy(**PLAN)
    size = model.runtime.programs.signature.cache_bytes
    for seed in range(5):
        run = Euler(model, seed)
        run.run()
        torch.testing.assert_close(run.velocities, alone(seed), rtol=0, atol=0)
        assert sd.stats(model).cache_bytes <= size
        del run
        gc.collect()


def test_caches_of_finished_keys_serve_the_next():
    model = toy(**PLAN)
    kept = [Euler(model, seed).run() for seed in range(12)]
    assert sd.stats(model).cache_bytes == model.runtime.programs.signature.cache_bytes
    assert len(streams_of(model)) == 8
    assert step_counts(model) == (48, 72, 0)
    del kept


def test_stream_that_lost_its_caches_refills_them():
    model = toy(**{**PLAN, "plan": Plan.warmup(3), **UNCORRECTED})
    first, second = Euler(model, 0), Euler(model, 1)
    first.run(4)
    second.run(4)  # takes the caches: the first looks finished
    first.run(2)
    assert first.errors[-2] < 1e-6 < first.errors[-1] < 0.2
    assert sd.stats(model).fallbacks == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latent_that_is_not_finite(bad):
    model = toy(**PLAN)
    run = Euler(model).run(5)
    broken = run.latent.clone()
    broken[0, 0, 0, 0] = bad
    exact = dense_velocity(model, broken, run.time(), run.prompt)
    output = model(broken, run.time(), run.prompt)
    torch.testing.assert_close(output, exact, equal_nan=True)
    assert streams_of(model) == []
    assert sd.stats(model).fallbacks == {"latent is not finite": 1}
    again = Euler(model, text=run.prompt).run()
    torch.testing.assert_close(again.velocities, alone(0), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("options", [PLAN, {}])
def test_time_that_is_not_finite(bad, index, options):
    model = toy(**options)
    run = Euler(model).run(index)
    output = model(run.latent, torch.tensor([bad]), run.prompt)
    exact = dense_velocity(model, run.latent, torch.tensor([bad]), run.prompt)
    torch.testing.assert_close(output, exact, equal_nan=True)
    assert streams_of(model) == []
    assert sd.stats(model).fallbacks == {"time is not finite": 1}


def test_guards_count_their_reasons(caplog):
    timeless = toy(programs=ToyPrograms(time=False), **PLAN)
    run = Euler(timeless)
    for _ in range(4):
        run.step()
    assert sd.stats(timeless).fallbacks == {"no time input": 4}
    poor = toy(**PLAN, max_cache_bytes=1)
    assert max(Euler(poor).run().errors) < 1e-6
    assert sd.stats(poor).fallbacks == {"cache budget exceeded": 10}
    assert sd.stats(poor).cache_bytes == 0
    mixed = toy(programs=ToyPrograms(batch=2), **PLAN)
    run = Euler(mixed, batch=2)
    output = mixed(run.latent, torch.tensor([1.0, 0.9]), run.prompt)
    exact = dense_velocity(mixed, run.latent, torch.tensor([1.0, 0.9]), run.prompt)
    torch.testing.assert_close(output, exact)
    assert sd.stats(mixed).fallbacks == {"time differs between batch rows": 1}
    assert caplog.messages.count("running dense: no time input") == 1


def test_budget_for_one_of_two_streams():
    model = toy(**PLAN)
    sd.configure(model, max_cache_bytes=model.runtime.programs.signature.cache_bytes)
    runs = [Euler(model, 0), Euler(model, 1)]
    for _ in range(10):
        for run in runs:
            run.step()
    torch.testing.assert_close(runs[0].velocities, alone(0), rtol=0, atol=0)
    assert max(runs[1].errors) < 1e-6
    assert sd.stats(model).fallbacks == {"cache budget exceeded": 9}
    assert step_counts(model) == (14, 6, 0)


def test_graph_without_parameters():
    refused = DenseOnly(lambda x: [x], "nothing to select", ())
    assert refused(noise())[0].equal(noise())
    runtime = Runtime(ToyPrograms(), Options(**PLAN))
    model = Toy(runtime)
    plain = [parameter.detach() for parameter in model.parameters()]
    run = Euler(model)
    for index in range(10):
        (velocity,) = runtime(*plain, run.latent, run.time(index), run.prompt, 4.0)
        run.latent = run.latent + (run.sigmas[index + 1] - run.sigmas[index]) * velocity
    assert runtime.programs.names().count("selective") == 6


def test_refused_graph_runs_dense_with_its_reason(caplog):
    model = Toy(lambda *_: [], 0)
    model.runtime = DenseOnly(lambda *inputs: [inputs[0] * 2], "mixing op: fft", range(5))
    for _ in range(3):
        output = model(noise(), torch.ones(1), prompt())
    assert output.requires_grad
    torch.testing.assert_close(output, model.embed * 2)
    stats = sd.stats(model)
    assert (stats.dense, stats.fallbacks, stats.graphs) == (3, {"mixing op: fft": 3}, 1)
    assert caplog.messages == ["running dense: mixing op: fft"]


def test_recompiles_are_graphs_over_the_same_parameters():
    model = toy(**PLAN)
    Euler(model).run(4)
    first = model.runtime
    model.runtime = Runtime(ToyPrograms(), Options(**PLAN))
    Euler(model).run(4)
    stats = sd.stats(model)
    assert (stats.graphs, stats.recompiles) == (2, 1)
    assert stats.compile_seconds == {"dense": 2.0, "selective": 4.0}
    assert stats.tokens_total == 8 * N
    del first
