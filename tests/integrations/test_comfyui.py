"""ComfyUI's call form, by stand-ins: patchers, wrappers, guiders and samplers as it has them.

`examples/serving/comfyui.py` runs the real one.
"""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdiff.errors import OptionError
from specdiff.integrations.comfyui import __main__ as command
from specdiff.integrations.comfyui.node import options_of
from specdiff.integrations.comfyui.patch import patched
from specdiff.integrations.comfyui.steps import steps_of
from specdiff.options import Options
from specdiff.plan import Plan

STEPS = 12
PLAN = Plan.of(STEPS, (0, 2, 4, 7, 11))
SIGMAS = torch.linspace(1, 0, STEPS + 1)
POSITIVE, NEGATIVE = [{"uuid": 1, "text": 0.7}], [{"uuid": 2, "text": -0.4}]


class Executor:
    """Calls wrappers around a function, as `comfy.patcher_extension.WrapperExecutor`."""

    def __init__(self, function: Any, wrappers: list[Any], owner: Any = None) -> None:
        self._function, self._wrappers, self.class_obj = function, wrappers, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self._function, self._wrappers[1:], self.class_obj).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self._function(*args, **kwargs)
        return self._wrappers[0](self, *args, **kwargs)


class Patcher:
    """A `ModelPatcher`: clones share the model, each has its own options."""

    def __init__(self, model: Denoiser, wrappers: Any = None) -> None:
        self.model, self.wrappers = model, wrappers or {}

    def clone(self) -> Patcher:
        return Patcher(self.model, {kind: dict(each) for kind, each in self.wrappers.items()})

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def all(self, kind: str) -> list[Any]:
        return [wrapper for each in self.wrappers.get(kind, {}).values() for wrapper in each]


class Denoiser(nn.Module):
    """Answers with what is under the noise; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.calls = 0

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        moved = torch.tanh(self.layer(x) * 0.3 + text[:, None, None, None] + sigma.mean())
        return x - sigma[:, None, None, None] * (x - moved)


class Pulled(Denoiser):
    """Moves the latent smoothly, but for what the text adds, which winds by little."""

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        level, text = (each[:, None, None, None] for each in (sigma, text))
        pull = 0.15 * text * torch.sin(5 * math.pi * level + self.layer(x))
        return x - level * (torch.tanh(self.layer(x)) + pull)


def answers(model: Denoiser, batched: bool) -> Callable[..., list[Tensor]]:
    """`calc_cond_batch`: conditions in one batch or one by one, areas pasted in."""

    def calc(_: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any) -> list[Tensor]:
        wanted = [(i, each) for i, cond in enumerate(conds) for each in cond or ()]
        out = [torch.zeros_like(x) for _ in conds]
        if batched:
            texts = torch.tensor([each["text"] for _, each in wanted]).repeat_interleave(len(x))
            rows = torch.cat([x] * len(wanted))
            made = model(rows, sigma.repeat(len(wanted)), texts).chunk(len(wanted))
        else:
            made = tuple(
                model(x[..., : each.get("width", 99)], sigma, torch.full((len(x),), each["text"]))
                for _, each in wanted
            )
        for (i, _each), part in zip(wanted, made, strict=True):
            out[i][..., : part.shape[-1]] += part
        return out

    return calc


class Guider:
    """A `CFGGuider`."""

    def __init__(self, patcher: Patcher, cfg: float, conds: Any, batched: bool) -> None:
        self.patcher, self.cfg, self.conds, self.batched = patcher, cfg, conds, batched

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any, seed: Any = None) -> Tensor:
        predict = Executor(self._predict, self.patcher.all("predict_noise"), self)
        return predict.execute(x, sigma, model_options, seed)  # type: ignore[no-any-return]

    def _predict(self, x: Tensor, sigma: Tensor, options: Any = None, seed: Any = None) -> Tensor:
        calc = answers(self.patcher.model, self.batched)
        conds = [self.conds[0], None if self.cfg == 1 else self.conds[1]]
        asked = Executor(calc, self.patcher.all("calc_cond_batch"))
        good, bad = asked.execute(self.patcher.model, conds, x, sigma, options)
        guided = good if self.cfg == 1 else bad + (good - bad) * self.cfg
        for function in options.get("sampler_post_cfg_function", ()):
            guided = function({"denoised": guided, "uncond_denoised": bad, "input": x})
        return guided  # type: ignore[no-any-return]


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
) -> Tensor:
    for i, (now, then) in enumerate(pairwise(sigmas)):
        answer = model(x, now * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback(i, answer)
        x = x + (x - answer) / now * (then - now)
    return x


def sample_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
) -> Tensor:
    for now, then in pairwise(sigmas):
        d = (x - model(x, now * x.new_ones(len(x)), **extra_args)) / now
        ahead = x + d * (then - now)
        if then > 0:
            d = (d + (ahead - model(ahead, then * x.new_ones(len(x)), **extra_args)) / then) / 2
        x = x + d * (then - now)
    return x


def sample_exp_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
) -> Tensor:
    """Heun's evaluations as samplers have them that go by log(snr): at sigmas that are rounded."""
    rounded = sigmas * (1 + 3e-7 * torch.tensor([1, -1]).repeat(len(sigmas))[: len(sigmas)])
    for now, then, near in zip(sigmas, sigmas[1:], rounded[1:], strict=False):
        d = (x - model(x, now * x.new_ones(len(x)), **extra_args)) / now
        if then > 0:
            ahead = x + d * (then - now)
            second = (ahead - model(ahead, near * x.new_ones(len(x)), **extra_args)) / near
            d = 0.7 * d + 0.3 * second
        x = x + d * (then - now)
    return x


def sample_dpmpp_2m(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
) -> Tensor:
    old = None
    for i, (now, then) in enumerate(pairwise(sigmas)):
        new = answer = model(x, now * x.new_ones(len(x)), **extra_args)
        h = (now / then).log() if then > 0 else math.inf
        if old is not None and then > 0:
            r = (sigmas[i - 1] / now).log() / h
            answer = (1 + 1 / (2 * r)) * new - old / (2 * r)
        x, old = (then / now) * x + (1 - then / now) * answer, new
    return x


def sample_ancestral(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
) -> Tensor:
    for now, then in pairwise(sigmas):
        answer = model(x, now * x.new_ones(len(x)), **extra_args)
        x = answer + then * torch.randn_like(x)
    return x


class Inpainting:
    """`KSamplerX0Inpaint`: puts the picture below, here an empty one, back outside the mask."""

    def __init__(self, guider: Guider, noise: Tensor, mask: Tensor) -> None:
        self._guider, self._noise, self._mask = guider, noise, mask

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        below = sigma[:, None, None, None] * self._noise
        answer = self._guider(x * self._mask + below * (1 - self._mask), sigma, **options)
        return answer * self._mask


def draw(
    patcher: Patcher,
    function: Any = sample_euler,
    *,
    cfg: float = 1.0,
    conds: Any = (POSITIVE, NEGATIVE),
    batched: bool = True,
    sigmas: Tensor = SIGMAS,
    shape: tuple[int, ...] = (1, 4, 8, 8),
    callback: Any = None,
    mask: Tensor | None = None,
    guide: type[Guider] = Guider,
) -> Tensor:
    """`CFGGuider.inner_sample`."""
    guider = guide(patcher, cfg, conds, batched)
    options = {"transformer_options": {"sample_sigmas": sigmas}}
    sampler = SimpleNamespace(sampler_function=function, extra_options={})

    def sample(_: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, *rest: Any) -> Any:
        asked = guider if mask is None else Inpainting(guider, noise, mask)
        return function(asked, noise, sigmas, extra, callback, True)

    run = Executor(sample, patcher.all("sampler_sample"), sampler)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    extra = {"model_options": options, "seed": 0}
    out: Tensor = run.execute(guider, sigmas, extra, callback, noise, None, mask, True)
    return out


@pytest.fixture
def patcher() -> Patcher:
    return Patcher(Denoiser())


@pytest.fixture(autouse=True)
def _lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "specdiff.integrations.comfyui")


def calls(patcher: Patcher, work: Callable[[], object]) -> int:
    patcher.model.calls = 0
    work()
    return patcher.model.calls


@pytest.mark.parametrize("function", [sample_euler, sample_heun, sample_dpmpp_2m, sample_ancestral])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_dense_is_exact(patcher: Patcher, function: Any, cfg: float) -> None:
    dense = patched(patcher, quality="dense")
    torch.manual_seed(5)
    alone = draw(patcher, function, cfg=cfg)
    torch.manual_seed(5)
    assert torch.equal(draw(dense, function, cfg=cfg), alone)


@pytest.mark.parametrize("function", [sample_euler, sample_heun, sample_dpmpp_2m])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_closer_than_fewer_steps(patcher: Patcher, function: Any, cfg: float) -> None:
    made, dense = (
        draw(patched(patcher, plan=PLAN), function, cfg=cfg),
        draw(patcher, function, cfg=cfg),
    )
    fewer = draw(patcher, function, cfg=cfg, sigmas=torch.linspace(1, 0, 6))
    assert (made - dense).norm() < (fewer - dense).norm()


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_takes_the_steps_of_the_plan(
    patcher: Patcher, caplog: pytest.LogCaptureFixture, power: float
) -> None:
    model = patched(patcher, plan=PLAN)
    assert calls(patcher, lambda: draw(model, sigmas=SIGMAS**power)) == 5
    assert "12 steps, 12 evaluations: 5 computed, 7 forecast (2.40x)" in caplog.text
    assert "5 as planned" in caplog.text


def karras(first: float, last: float, steps: int = 28) -> Tensor:
    ends = [sigma ** (1 / 7) for sigma in (first, last)]
    sigmas = torch.linspace(*ends, steps) ** 7  # type: ignore[call-overload]
    return torch.cat([sigmas, torch.zeros(1)])


@pytest.mark.parametrize(("first", "last"), [(1.0, 0.003), (14.6, 0.03)])
def test_uneven_noise_levels_are_computed_where_the_noise_is(
    patcher: Patcher, caplog: pytest.LogCaptureFixture, first: float, last: float
) -> None:
    """As many as planned, and earlier; of a flow, and of a noise schedule."""
    sigmas, seen = karras(first, last), list[float]()
    hook = patcher.model.register_forward_pre_hook(lambda _, args: seen.append(float(args[1][0])))
    plan = Options(quality="balanced").resolve().plan
    draw(patched(patcher, plan=plan), sigmas=sigmas)
    hook.remove()
    assert f"28 evaluations: {len(plan.dense)} computed" in caplog.text
    assert seen[0] == pytest.approx(first) and seen[-1] == pytest.approx(last)
    assert sum(seen) > sum(float(sigmas[i]) for i in plan.dense)


@pytest.mark.parametrize("function", [sample_euler, sample_dpmpp_2m])
def test_what_guidance_magnifies_is_computed(
    caplog: pytest.LogCaptureFixture, function: Any
) -> None:
    """By a quality; as it guides more, forecasts miss more. A plan that is given is followed."""
    patcher, steps = Patcher(Pulled()), torch.linspace(1, 0, 29)
    for batched in (True, False):
        how: dict[str, Any] = {"sigmas": steps, "cfg": 12.0, "batched": batched}
        exact = draw(patcher, function, **how)
        ours = draw(patched(patcher, quality="balanced"), function, **how)
        plan = Options(quality="balanced").resolve().plan
        planned = draw(patched(patcher, plan=plan), function, **how)
        assert (ours - exact).norm() < (planned - exact).norm() / 3
    first, _, second, _ = (line for line in caplog.text.splitlines() if "28 steps" in line)
    assert "forecasts miss much" in first
    assert first.partition("28 steps")[2] == second.partition("28 steps")[2]


def test_a_small_mask_hides_nothing_that_is_missed() -> None:
    patcher, mask = Patcher(Pulled()), torch.zeros(1, 4, 8, 8)
    mask[..., :2, :2] = 1
    how: dict[str, Any] = {"sigmas": torch.linspace(1, 0, 29), "cfg": 12.0, "mask": mask}
    exact = draw(patcher, **how)
    ours = draw(patched(patcher, quality="balanced"), **how)
    planned = draw(patched(patcher, plan=Options(quality="balanced").resolve().plan), **how)
    errors = [((each - exact) * mask).norm() for each in (ours, planned)]
    assert errors[0] < errors[1] / 2


class Windows(Guider):
    """Asks for halves of the latent, one after the other, as context windows do."""

    def _predict(self, x: Tensor, sigma: Tensor, options: Any = None, seed: Any = None) -> Tensor:
        asked = super()._predict
        return torch.cat([asked(part, sigma, options) for part in x.chunk(2, -1)], -1)


@pytest.mark.parametrize("options", [{"plan": PLAN}, {"quality": "balanced"}])
def test_windows_are_computed(caplog: pytest.LogCaptureFixture, options: Any) -> None:
    patcher = Patcher(Denoiser())
    made = draw(patched(patcher, **options), cfg=4.0, guide=Windows)
    assert torch.equal(made, draw(patcher, cfg=4.0, guide=Windows))
    assert "12 as a part of the latent was asked for" in caplog.text


def test_without_guidance_the_plan_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    draw(patched(Patcher(Denoiser()), quality="balanced"), sigmas=torch.linspace(1, 0, 29))
    assert "11 computed" in caplog.text and "miss" not in caplog.text


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize("function", [sample_euler, sample_ancestral])
def test_inpainting_is_no_noise(
    patcher: Patcher, caplog: pytest.LogCaptureFixture, function: Any, width: int
) -> None:
    """Outside the mask the picture is put back at each step, however small the mask is."""
    mask = torch.zeros(1, 4, 8, 8)
    mask[..., :width, :width] = 1
    draw(patched(patcher, plan=PLAN), function, mask=mask)
    assert ("5 computed, 7 forecast" in caplog.text) == (function is sample_euler)
    assert ("samplers that add noise" in caplog.text) == (function is sample_ancestral)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_few_steps_are_computed(
    patcher: Patcher, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    sigmas = torch.linspace(1, 0, steps + 1)
    made = draw(patched(patcher, quality="fast"), sigmas=sigmas)
    assert torch.equal(made, draw(patcher, sigmas=sigmas))
    assert f"{steps} as steps are few" in caplog.text


def test_a_sampler_of_two_evaluations_a_step(
    patcher: Patcher, caplog: pytest.LogCaptureFixture
) -> None:
    draw(patched(patcher, plan=PLAN), sample_heun)
    assert "23 evaluations: 10 computed, 13 forecast" in caplog.text


def test_a_sigma_that_is_rounded_is_the_same(
    patcher: Patcher, caplog: pytest.LogCaptureFixture
) -> None:
    made, dense = draw(patched(patcher, plan=PLAN), sample_exp_heun), draw(patcher, sample_exp_heun)
    fewer = draw(patcher, sample_exp_heun, sigmas=torch.linspace(1, 0, 6))
    assert (made - dense).norm() < (fewer - dense).norm()
    assert "23 evaluations: 10 computed, 13 forecast" in caplog.text


def test_batched_and_one_by_one_agree(patcher: Patcher) -> None:
    model = patched(patcher, plan=PLAN)
    together, apart = draw(model, cfg=4.0), draw(model, cfg=4.0, batched=False)
    assert torch.allclose(together, apart, atol=1e-5)
    assert calls(patcher, lambda: draw(model, cfg=4.0)) == 5
    assert calls(patcher, lambda: draw(model, cfg=4.0, batched=False)) == 10


def test_areas_of_several_sizes(patcher: Patcher) -> None:
    model, area = patched(patcher, plan=PLAN), {"uuid": 3, "text": 0.1, "width": 5}
    conds = ([*POSITIVE, area], NEGATIVE)
    assert calls(patcher, lambda: draw(model, cfg=4.0, conds=conds, batched=False)) == 15


def test_a_condition_that_ends_on_the_way(
    patcher: Patcher, caplog: pytest.LogCaptureFixture
) -> None:
    early = [{**POSITIVE[0], "timestep_start": 1.0, "timestep_end": 0.52}, {"uuid": 4, "text": 0.2}]
    draw(patched(patcher, plan=PLAN), conds=(early, NEGATIVE))
    assert "1 as its conditions changed" in caplog.text


def test_noise_is_computed_and_said(patcher: Patcher, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(patcher, plan=PLAN)
    torch.manual_seed(5)
    made = draw(model, sample_ancestral)
    torch.manual_seed(5)
    error = (made - draw(patcher, sample_ancestral)).norm() / made.norm()
    assert error < 0.5
    assert "samplers that add noise" in caplog.text


def test_two_workflows_in_turns(patcher: Patcher) -> None:
    first, second = patched(patcher, plan=PLAN), patched(patcher, plan=Plan.every(2))
    other = {"conds": (NEGATIVE, POSITIVE), "shape": (2, 4, 6, 6)}
    alone = draw(first), draw(second, **other)
    turns = draw(first), draw(second, **other), draw(first), draw(second, **other)
    assert all(torch.equal(turn, alone[i % 2]) for i, turn in enumerate(turns))


def test_within_another_run(patcher: Patcher) -> None:
    """Two runs interleaved, each with its own state."""
    model = patched(patcher, plan=PLAN)
    alone, inner = draw(model), []
    outer = draw(model, callback=lambda i, _: inner.append(draw(model)) if i == 3 else None)
    assert torch.equal(outer, alone)
    assert torch.equal(inner[0], alone)


def test_interrupted_runs_leave_nothing(patcher: Patcher, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(patcher, plan=PLAN)
    alone = draw(model)
    caplog.clear()

    def interrupt(step: int, _: Tensor) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, callback=interrupt)
    assert "6 evaluations: 3 computed, 3 forecast" in caplog.text
    assert torch.equal(draw(model), alone)


def test_other_clones_stay_as_they_are(patcher: Patcher) -> None:
    before = copy.copy(patcher.wrappers)
    model = patched(patcher, plan=PLAN)
    assert patcher.wrappers == before
    assert calls(patcher, lambda: draw(patcher)) == STEPS
    assert calls(patcher, lambda: draw(model.clone())) == 5
    again = patched(model, plan=Plan.every(1))  # a second node takes the place of the first
    assert calls(patcher, lambda: draw(again)) == STEPS


def test_weights_patched_between_runs(patcher: Patcher) -> None:
    model, weight = patched(patcher, plan=PLAN), patcher.model.layer.weight.data
    before = draw(model)
    weight += 0.1  # a LoRA, in place
    fresh = Patcher(Denoiser())
    fresh.model.load_state_dict(patcher.model.state_dict())
    assert torch.equal(draw(model), draw(patched(fresh, plan=PLAN)))
    weight -= 0.1
    assert torch.allclose(draw(model), before, atol=1e-5)


def test_previews_see_every_step(patcher: Patcher) -> None:
    seen: list[Tensor] = []
    draw(patched(patcher, plan=PLAN), callback=lambda _, answer: seen.append(answer))
    assert len(seen) == STEPS
    assert all(answer.isfinite().all() for answer in seen)


def test_switched_off(
    patcher: Patcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPECDIFF", "off")
    assert torch.equal(draw(patched(patcher, plan=PLAN)), draw(patcher))
    assert "12 as SPECDIFF=off" in caplog.text


def test_weights_of_samplers() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.2, 0.0])
    found = steps_of(SimpleNamespace(sampler_function=sample_euler, extra_options={}), None, sigmas)
    assert found is not None and found.weights is not None
    assert found.weights.due(2) == pytest.approx((-0.4, -0.4, -0.2))
    noisy = SimpleNamespace(sampler_function=sample_ancestral, extra_options={})
    torch.manual_seed(0)
    assert steps_of(noisy, None, sigmas) is None
    after = torch.randn(1)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(1), after)  # nothing was drawn from the run's numbers


def _post(options: dict[str, Any], function: Any) -> dict[str, Any]:
    """`comfy.model_patcher.set_model_options_post_cfg_function`."""
    return {**options, "sampler_post_cfg_function": [function]}


def sample_cfg_pp(order: int, noise: float = 0.0) -> Any:
    """Euler, or a sampler of two steps, by the answers without guidance."""

    def sample(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
    ) -> Tensor:
        unguided: list[Tensor] = []

        def keep(given: dict[str, Tensor]) -> Tensor:
            unguided.append(given["uncond_denoised"])
            return given["denoised"]

        extra = {**extra_args, "model_options": _post(extra_args["model_options"], keep)}
        for now, then in pairwise(sigmas):
            answer = model(x, now * x.new_ones(len(x)), **extra)
            moved = answer + then * (x - unguided[-1]) / now
            if order == 2 and len(unguided) > 1:
                moved = moved + then * (answer - unguided[-2])
            x = moved + noise * then * torch.randn_like(x) if noise else moved
        return x

    return sample


@pytest.mark.parametrize(("order", "noise"), [(1, 0.0), (2, 0.0), (1, 0.3)])
def test_samplers_that_magnify_what_forecasts_miss(
    patcher: Patcher, caplog: pytest.LogCaptureFixture, order: int, noise: float
) -> None:
    sampler, dense = sample_cfg_pp(order, noise), order == 2 or noise > 0
    torch.manual_seed(5)
    made = draw(patched(patcher, plan=PLAN), sampler, cfg=4.0)
    assert ("12 as the sampler magnifies" in caplog.text) == dense
    torch.manual_seed(5)
    assert torch.equal(made, draw(patcher, sampler, cfg=4.0)) == dense


def test_options() -> None:
    assert options_of("fast", " ") == {"quality": "fast"}
    assert options_of("fast", "plan.json") == {"plan": "plan.json"}
    with pytest.raises(OptionError, match="quality"):
        patched(Patcher(Denoiser()), quality="best")


def test_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert "custom_nodes" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert command.main([str(tmp_path)]) == 0
    file = tmp_path / "custom_nodes" / command.FILE
    namespace: dict[str, Any] = {}
    exec(file.read_text(), namespace)
    assert callable(namespace["comfy_entrypoint"])


def test_comfyui_is_not_imported() -> None:
    code = (
        "import sys, specdiff.integrations.comfyui.node, specdiff.integrations.comfyui.patch\n"
        "assert not [name for name in sys.modules if name.split('.')[0].startswith('comfy')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
