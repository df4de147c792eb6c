"""Many generations on one model: threads, more than are remembered, alike, or cut short."""

import gc
import itertools
import sys
import threading
import weakref

import pytest
import torch

import specdiff as sd
from specdiff.plan import Plan
from specdiff.runtime.streams.table import MAX_STREAMS
from tests.helpers import PLAN
from tests.runtime.toy import (
    CHANNELS,
    SIDE,
    UNCORRECTED,
    Euler,
    ToyPrograms,
    dense_velocity,
    noise,
    prompt,
    sigmas,
    toy,
)


def alone(seed):
    """Velocities of a generation that has the model to itself."""
    return Euler(toy(**PLAN), seed).run().velocities


def timed(seed):
    """The same of a session with times."""
    run = Euler(toy(**PLAN), seed)
    with sd.session(run.model, timesteps=run.sigmas[:-1]):
        return run.run()


class WaitingPrograms(ToyPrograms):
    """Programs in whose midst other threads get their turn, if anything lets them."""

    def dense(self, inputs, caches):
        threading.Event().wait(1e-3)
        return super().dense(inputs, caches)

    def selective(self, *args, **options):
        threading.Event().wait(1e-3)
        return super().selective(*args, **options)


@pytest.mark.parametrize("in_sessions", [False, True])
def test_threads_share_a_model(in_sessions):
    model = toy(programs=WaitingPrograms(), **PLAN)
    found, errors = {}, []
    start = threading.Barrier(6)

    def draw(seed):
        try:
            torch.set_num_threads(1)
            start.wait()
            run = Euler(model, seed)
            if in_sessions:
                with sd.session(model, timesteps=run.sigmas[:-1]):
                    run.run()
            else:
                run.run()
            found[seed] = run
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sd.stats(model).evaluations == 60
    for seed, run in found.items():
        assert max(run.errors[:3]) < 1e-6
        if in_sessions:  # others may lend their caches to one another, and fill them again
            torch.testing.assert_close(run.velocities, timed(seed).velocities, rtol=0, atol=0)


def test_a_reset_while_threads_make_sessions():
    model, done = toy(**PLAN), threading.Event()
    held = [sd.session(model) for _ in range(2000)]

    def make():
        while not done.is_set():
            held.append(sd.session(model))

    threads = [threading.Thread(target=make)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(10):
            sd.reset(model)
            sd.stats(model)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_more_generations_in_turns_than_are_remembered(caplog):
    """One too many costs nobody but itself, and is told."""
    model = toy(**PLAN)
    runs = [Euler(model, seed) for seed in range(MAX_STREAMS + 1)]
    for _ in range(10):
        for run in runs:
            run.step()
    assert max(runs[0].errors) < 1e-6
    for seed in range(1, MAX_STREAMS + 1):
        torch.testing.assert_close(runs[seed].velocities, alone(seed), rtol=0, atol=0)
    stats = sd.stats(model)
    assert stats.fallbacks == {"more than 8 generations at once": 9}
    assert stats.selective == 6 * MAX_STREAMS
    assert caplog.messages == [
        "running dense: more than 8 generations at once",
        "more than 8 generations at once: give each a session",
    ]
    runs[0] = Euler(model, 20, text=runs[0].prompt).run()  # the others are over
    torch.testing.assert_close(
        runs[0].velocities, Euler(toy(**PLAN), 20, text=prompt()).run().velocities, rtol=0, atol=0
    )


def frames(count, likeness):
    """Latents of image-to-image: pictures that differ so much, one noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (count + 2, 1, CHANNELS, SIDE, SIDE)
    base, added, *changes = torch.randn(shape, generator=generator)
    return [0.4 * (base + likeness * change) + 0.6 * added for change in changes]


@pytest.mark.parametrize("options", [PLAN, {}, {"method": "paper"}])
@pytest.mark.parametrize("likeness", [0.0, 0.1, 1.0])
def test_generations_of_one_step(options, likeness):
    """Image-to-image of little strength: the same time again and again, and latents alike."""
    model, text, time = toy(**options), prompt(), torch.tensor([0.6])
    for latent in frames(4, likeness):
        velocity = model(latent, time, text)
        torch.testing.assert_close(velocity, dense_velocity(model, latent, time, text))
    assert sd.stats(model).dense == 4


def test_ambiguity_ends_with_the_next_generation():
    model, text = toy(**PLAN), prompt()
    Euler(model, 0, text=text).run(4)  # cut short
    later = Euler(model, 1, text=text)
    later.index = 6  # image-to-image, so that time goes on
    later.run()
    assert sd.stats(model).fallbacks == {"ambiguous stream": 4}
    again = Euler(model, 2, text=text).run()
    expected = Euler(toy(**PLAN), 2, text=text).run()
    torch.testing.assert_close(again.velocities, expected.velocities, rtol=0, atol=0)


def test_an_interrupt_keeps_no_caches(monkeypatch):
    """Although interpreters keep the traceback, and with it all that was in use."""

    class Interrupted(ToyPrograms):
        broken = True

        def selective(self, *args, **options):
            if self.broken:
                raise KeyboardInterrupt
            return super().selective(*args, **options)

    programs = Interrupted()
    model = toy(programs=programs, **PLAN, max_cache_bytes=programs.signature.cache_bytes)
    with pytest.raises(KeyboardInterrupt) as caught:
        Euler(model, 0).run()
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    programs.broken = False
    run = Euler(model, 1).run()
    torch.testing.assert_close(run.velocities, alone(1), rtol=0, atol=0)
    assert sd.stats(model).fallbacks == {}


def test_caches_that_dense_steps_passed_over_are_not_read():
    """Settings that select nothing for a while: their dense steps write no caches."""
    model = toy(**{**PLAN, "plan": Plan.warmup(3)}, **UNCORRECTED)
    run = Euler(model, steps=16).run(6)
    sd.configure(model, cache_ratio=0.0)
    run.run(5)
    sd.configure(model, cache_ratio=0.75)
    run.run(2)
    assert model.runtime.programs.names()[-3:] == ["probe", "dense", "selective"]


def test_both_halves_of_guidance_find_their_caches_again(monkeypatch):
    """At the same addresses, as CUDA graphs need it."""
    model, made = toy(**PLAN), []
    allocate = model.runtime.pool._allocate
    monkeypatch.setattr(model.runtime.pool, "_allocate", lambda: made.append(1) or allocate())
    for seed in range(3):
        runs = [Euler(model, seed, text=prompt(half)) for half in (10 * seed, 10 * seed + 1)]
        for _ in range(10):
            for run in runs:
                run.step()
        del runs, run
    assert len(made) == 2


def test_guidance_in_separate_calls_after_a_warm_up():
    """One evaluation of each prompt begins nothing that is doubted for ever."""
    model, texts = toy(**PLAN), (prompt(0), prompt(1))
    for text in texts:
        model(noise(), torch.tensor([1.0]), text)
    for seed in range(3):
        latent = noise(seed)
        for now, then in itertools.pairwise(sigmas(10)):
            time = torch.tensor([now])
            halves = [model(latent, time, text) for text in texts]
            latent = latent + (then - now) * (halves[0] + 7.5 * (halves[1] - halves[0]))
    assert sd.stats(model).fallbacks == {}
    assert sd.stats(model).selective == 3 * 2 * 6


def test_prompts_crowded_out_of_a_session_are_not_kept_alive():
    model = toy(**PLAN)
    with sd.session(model):
        texts = [prompt(seed) for seed in range(30)]
        for text in texts:
            model(noise(), torch.tensor([1.0]), text)
        alive = [weakref.ref(text) for text in texts]
        del texts, text
        gc.collect()
        assert sum(ref() is not None for ref in alive) == MAX_STREAMS


def test_one_that_was_crowded_out_begins_again():
    model = toy(**PLAN)
    texts = [prompt(seed) for seed in range(MAX_STREAMS + 1)]
    for seed, text in enumerate(texts):
        model(noise(10 + seed), torch.tensor([1.0]), text)
    for seed in range(2):
        run = Euler(model, seed, text=texts[0])
        run.index = 4  # image-to-image: the first time goes on from that of the warm-up
        run.run()
    assert sd.stats(model).fallbacks == {"more than 8 generations at once": 6}
    assert sd.stats(model).selective > 0
