"""The paper's equations, transcribed as slow loops over Python floats, against the runtime."""

import math

import pytest
import torch

from specdiff.plan import Plan
from tests.runtime.toy import (
    CHANNELS,
    LAYERS,
    SIDE,
    WIDTH,
    Euler,
    N,
    ToyPrograms,
    noise,
    prompt,
    sigmas,
    toy,
)

STEPS, WARMUP = 9, 3


class Paper:
    """Algorithm of the paper for one sample: state in lists, one entry a token."""

    def __init__(self, model, ratio, starvation, share, speculative, measured):
        self.inputs, self.run_toy = list(model.parameters()), model.runtime.programs._run
        self.active = round((1 - ratio) * N)
        self.starvation, self.share = starvation, share
        self.speculative_steps = speculative
        self.measured = measured
        self.caches = [torch.zeros(1, N, 2, WIDTH) for _ in range(LAYERS)]
        self.cf = [0] * N
        self.past = []  # (T, [N][C]) newest last
        self.future = []  # (T, [N])
        self.his = [0.0] * N

    @torch.no_grad()
    def network(self, latent, time, text, caches, active=None):
        inputs = [*self.inputs, latent, torch.tensor([time]), text, 4.0]
        rows = None if active is None else torch.tensor([active])
        found = self.run_toy(inputs, caches, rows)
        return found.tokens[0].tolist(), found.importance[0].tolist()

    def fut(self, time):
        """Nearest future speculative step; none left: the last one."""
        coming = [importance for at, importance in self.future if at <= time]
        return coming[0] if coming else self.future[-1][1]

    def classify(self, time):
        """Equations 2 to 5."""
        future = self.fut(time) if self.future else [1.0] * N
        score = [self.his[i] * future[i] * math.exp(self.starvation * self.cf[i]) for i in range(N)]
        falling = sorted(range(N), key=lambda i: -score[i])
        first = sorted(falling[: self.active])
        second, held = set(), 0.0
        for i in reversed(falling):
            held += score[i]
            if held > self.share * sum(score) or i in first:
                break
            second.add(i)
        return first, second

    def predict(self, token, time):
        """Equation 6."""
        weights = [math.exp(-i * (self.past[-i][0] - time)) for i in (1, 2, 3)]
        total = sum(weights)
        return [
            sum(weights[i - 1] / total * self.past[-i][1][token][c] for i in (1, 2, 3))
            for c in range(CHANNELS)
        ]

    def evaluate(self, latent, time, text):
        index = len(self.past)
        if index < WARMUP:
            output, self.his = self.network(latent, time, text, self.caches)
        else:
            first, second = self.classify(time)
            computed, his = self.network(latent, time, text, self.caches, first)
            self.his = his if self.measured else self.his
            output = []
            for i in range(N):
                if i in first:
                    output.append(computed[first.index(i)])
                    continue
                self.cf[i] += 1
                output.append(self.past[-1][1][i] if i in second else self.predict(i, time))
        self.past.append((time, output))
        velocity = torch.tensor(output).T.reshape(1, CHANNELS, SIDE, SIDE)
        if index == 1:
            for j in range(1, self.speculative_steps):
                at = 1 - j / self.speculative_steps
                jumped = latent + (at - time) * velocity
                self.future.append((at, self.network(jumped, at, text, None)[1]))
        return velocity


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("starvation", "speculative", "share"), [(0.5, 2, 0.1), (0.05, 3, 0.3)])
@pytest.mark.parametrize("measured", [True, False])
def test_runtime_agrees_with_the_paper(ratio, starvation, speculative, share, measured):
    """To the letter it measures in every step; and with other constants than its own."""
    model = toy(
        method="paper", plan=Plan.warmup(WARMUP, lookahead=speculative), cache_ratio=ratio,
        ablation={
            "starvation": starvation, "reuse_share": share, "selective_importance": measured
        },
    )  # fmt: skip
    paper = Paper(model, ratio, starvation, share, speculative, measured)
    latent, text, times = noise(), prompt(), sigmas(STEPS)
    run = Euler(model, steps=STEPS)
    for index in range(STEPS):
        expected = paper.evaluate(latent, times[index], text)
        latent = latent + (times[index + 1] - times[index]) * expected
        torch.testing.assert_close(run.step(), expected, rtol=1e-4, atol=1e-5)
    reused = [len(paper.classify(t)[1]) for t in times[-3:]]
    assert share < 0.2 or max(reused) > 0
    assert len(model.runtime.programs.calls) == STEPS + speculative - 1


def test_units_of_time_do_not_matter_to_mean():
    """T of equation 6 is sigma, whatever unit the model's time input has, and rising or falling."""
    runs = []
    for unit, rising in ((1, False), (1000, False), (1000, True)):
        programs = ToyPrograms(unit=unit, rising=rising)
        model = toy(programs=programs, method="paper", cache_ratio=0.75)

        def as_time(sigma, unit=unit, rising=rising):
            return (1 - sigma if rising else sigma) * unit

        runs.append(Euler(model, steps=STEPS, as_time=as_time).run().velocities)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-3, atol=1e-4)
