"""The entry point: options, reports, refusals, and how it lives with Dynamo."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import specdiff
from specdiff import torch_adapter
from specdiff.passes.emit.lower import Lowered
from specdiff.passes.select.axes import AxesPass
from specdiff.plan import Plan
from tests.helpers import THREE_DENSE, counts
from tests.models import flux, sd3

EXACT = {"rtol": 1e-4, "atol": 1e-5}
STEPS = 10


@pytest.fixture
def small() -> tuple[nn.Module, dict[str, Any]]:
    return flux(rows=4, columns=5, batch=1)


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {"inner_backend": "eager", **THREE_DENSE, **options}
    return torch.compile(model, backend="specdiff", fullgraph=True, options=options)


@torch.no_grad()
def loop(model: Any, inputs: dict[str, Any], steps: int = STEPS) -> list[Tensor]:
    """Velocities of an Euler sampler; the times of one run, the prompt one object."""
    latent, velocities = inputs["hidden_states"], []
    for index in range(steps):
        time = torch.full_like(inputs["timestep"], 1 - index / STEPS)
        velocity = model(**{**inputs, "hidden_states": latent, "timestep": time})[0]
        velocities.append(velocity)
        latent = latent - velocity / STEPS
    return velocities


def configured(**options: Any) -> Any:
    """`specdiff.backend(...)` in a process in which Dynamo has already used the entry point."""
    torch._dynamo.lookup_backend("specdiff")
    return specdiff.backend(**options)


@pytest.mark.parametrize(
    ("options", "programs", "speculative"),
    [
        ({}, {"probe", "tail"}, 0),
        ({"method": "paper"}, {"dense", "selective_2_measured", "tail"}, 1),
        (
            {"method": "paper", "plan": Plan.warmup(3, lookahead=0), "cache_ratio": 0.9},
            {"dense", "selective_2_measured", "tail"},
            0,
        ),
        (
            {"method": "paper", "ablation": {"selective_importance": False}},
            {"dense", "selective_2", "tail"},
            1,
        ),
        (
            {"plan": Plan.tapered(4), "cache_ratio": 0.5, "text_steps": "dense"},
            {"dense", "textless_10_measured", "tail"},
            1,
        ),
    ],
    ids=["default", "paper", "no look-ahead", "importance of dense steps", "text left out"],
)
def test_no_more_programs_are_compiled_than_a_plan_needs(small, options, programs, speculative):
    """One that computes every token, one that computes some; over one generation and the next."""
    model, inputs = small
    options = {"inner_backend": "eager", **options}
    selective = torch.compile(model, backend="specdiff", fullgraph=True, options=options)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        loop(selective, inputs)
        assert set(specdiff.stats(selective).compile_seconds) == programs
    assert torch_adapter.graphs_compiled() == 1
    assert specdiff.stats(selective).speculative == 2 * speculative


# Entry point and options ------------------------------------------------------------------------


def test_works_without_importing_specdiff():
    program = """
import sys
import torch
assert "specdiff" in torch._dynamo.list_backends()
assert "specdiff" not in sys.modules
model = torch.nn.Linear(3, 3)
options = {"inner_backend": "eager"}
compiled = torch.compile(model, backend="specdiff", options=options)
with torch.no_grad():
    x = torch.randn(2, 3)
    assert torch.equal(compiled(x), model(x))
assert "specdiff.compiler" in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def handed_over(monkeypatch) -> list[dict[str, Any]]:
    """The Inductor settings of every program compiled; Inductor itself is left out."""
    seen: list[dict[str, Any]] = []

    def compile_fx(module: Any, _: Any, config_patches: Any = None) -> Any:
        seen.append(dict(config_patches or {}))
        return module

    monkeypatch.setattr(torch_adapter.inductor, "compile_fx", compile_fx)
    return seen


MODE = "max-autotune-no-cudagraphs"


@pytest.mark.parametrize(
    "arguments",
    [
        {"backend": "specdiff", "options": {"mode": MODE}},
        {"backend": {"cache_ratio": 0.5}, "mode": MODE},
        pytest.param({"backend": "specdiff", "mode": MODE}, marks=pytest.mark.slow),
        pytest.param({"backend": {"mode": MODE}}, marks=pytest.mark.slow),
    ],
)
def test_mode_reaches_inductor(small, handed_over, arguments):
    model, inputs = small
    if arguments["backend"] != "specdiff":
        arguments = {**arguments, "backend": configured(**arguments["backend"])}
    selective = torch.compile(model, fullgraph=True, **arguments)
    loop(selective, inputs, 1)
    expected = torch._inductor.list_mode_options(MODE)
    assert expected
    assert handed_over == [expected] * 2  # probe and tail
    assert counts(selective)[:2] == (1, 0)


def test_inductor_settings_among_the_options(small, handed_over):
    model, inputs = small
    options = {"epilogue_fusion": False, "cpp.simdlen": 1, **THREE_DENSE}
    loop(torch.compile(model, backend="specdiff", options=options), inputs)
    settings = {"epilogue_fusion": False, "cpp.simdlen": 1}
    assert handed_over == [settings] * 3  # dense, tail, selective


def test_setting_beside_mode_wins(small, handed_over):
    model, inputs = small
    options = {"mode": MODE, "max_autotune": False}
    loop(torch.compile(model, backend="specdiff", options=options), inputs, 1)
    assert handed_over[0]["max_autotune"] is False


def test_default_mode_sets_nothing(small, handed_over):
    model, inputs = small
    loop(torch.compile(model, backend="specdiff", mode="default"), inputs, 1)
    assert handed_over == [{}, {}]


def test_options_reach_the_runtime(small):
    model, inputs = small
    selective = compiled(model, plan=Plan.warmup(4, lookahead=0), cache_ratio=0.5)
    loop(selective, inputs)
    assert counts(selective) == (4, 6, 0, 0)
    assert specdiff.stats(selective).tokens_computed == 4 * 20 + 6 * 10


def test_configured_backend(small):
    model, inputs = small
    backend = configured(**THREE_DENSE, inner_backend="eager")
    selective = torch.compile(model, backend=backend, fullgraph=True)
    loop(selective, inputs)
    assert counts(selective) == (3, 7, 0, 1)


@pytest.mark.parametrize("mode", ["nosuch", 3])
def test_a_mode_that_torch_has_not_is_refused_at_once(mode):
    valid = "must be one of 'default', "
    with pytest.raises(specdiff.OptionError, match=f"mode={mode!r}: {valid}"):
        specdiff.backend(mode=mode)


@pytest.mark.parametrize("options", [{"cache_ration": 0.9}, {"cache_ratio": 2}])
def test_wrong_option(small, options):
    model, inputs = small
    with pytest.raises(BackendCompilerFailed) as caught:
        loop(torch.compile(model, backend="specdiff", options=options), inputs, 1)
    error = caught.value.inner_exception
    assert isinstance(error, specdiff.OptionError)
    if "cache_ration" in options:
        assert "did you mean 'cache_ratio'?" in str(error)
        for name in ("cache_ratio", "plan", "inner_backend", "dump_dir"):
            assert name in str(error)
    else:
        assert "from 0 to 1" in str(error)


def test_wrong_option_of_a_configured_backend_is_raised_at_once():
    with pytest.raises(specdiff.OptionError, match="bogus: no such option"):
        configured(bogus=1)


@pytest.mark.parametrize(
    "how", ["compiled with it", pytest.param("session", marks=pytest.mark.slow), "environment"]
)
def test_switched_off_the_outputs_are_the_models_own(small, monkeypatch, how):
    """To the bit, as the graph runs as it came; and nothing recompiles."""
    model, inputs = small
    exact = loop(model, inputs)
    selective = compiled(model, quality="dense") if how.startswith("compiled") else compiled(model)
    if how == "environment":
        monkeypatch.setenv("SPECDIFF", "off")
    with specdiff.session(selective, **({"quality": "dense"} if how == "session" else {})):
        assert torch.equal(torch.stack(loop(selective, inputs)), torch.stack(exact))
    assert counts(selective) == (STEPS, 0, 0, 0)
    assert specdiff.stats(selective).compile_seconds == {}  # no program of ours
    monkeypatch.delenv("SPECDIFF", raising=False)
    specdiff.configure(selective, quality=None)
    loop(selective, inputs)
    assert counts(selective) == (STEPS + 3, 7, 0, 1)
    assert specdiff.stats(selective).recompiles == 0


# Refusals ---------------------------------------------------------------------------------------


def test_training_runs_plain_with_gradients(small, caplog):
    model, inputs = small
    other = copy.deepcopy(model)
    reason = "gradients are required"
    trained = torch.compile(model, backend="specdiff", options={"inner_backend": "aot_eager"})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trained(**inputs)[0].square().sum().backward()
            other(**inputs)[0].square().sum().backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **EXACT)
    assert any(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert len([message for message in caplog.messages if reason in message]) == 1
    found = specdiff.stats(trained)
    assert [(name.startswith(reason), count) for name, count in found.fallbacks.items()] == [
        (True, 2)
    ]
    assert counts(trained) == (2, 0, 0, 0)


@pytest.mark.slow
def test_sampling_between_training_steps_is_selective(small):
    model, inputs = small
    mixed = torch.compile(
        model, backend="specdiff", options={"inner_backend": "eager", **THREE_DENSE}
    )
    mixed(**inputs)[0].sum().backward()
    loop(mixed, inputs)
    assert counts(mixed) == (4, 7, 0, 1)
    mixed(**inputs)[0].sum().backward()
    assert counts(mixed) == (5, 7, 0, 1)


class Perceptron(nn.Module):
    """Denoises each pixel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(hidden_states * timestep[:, None, None])


def test_model_without_attention(caplog):
    model = Perceptron()
    inputs = {"hidden_states": torch.randn(2, 9, 8), "timestep": torch.ones(2)}
    dense = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(dense(**inputs), model(**inputs), **EXACT)
    report = specdiff.explain(model, **inputs)
    assert not report.selective
    assert "attention" in report.reason
    words = f"\ntoken selection: no, because {report.reason}"
    assert str(report) == "step plan: yes, keeps at most 0.0 MiB a generation" + words
    assert "\nstep plan: yes" + words in str(specdiff.stats(dense))
    # its whole steps can be forecast; each of these calls begins a generation, which is dense
    assert specdiff.stats(dense).dense == 3
    assert specdiff.stats(dense).fallbacks == {}
    said = [record.message for record in caplog.records if record.name.startswith("specdiff")]
    assert said == []


def test_error_in_a_pass_runs_dense(small, monkeypatch, caplog):
    model, inputs = small

    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(AxesPass, "apply", broken)
    dense = compiled(model)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(loop(dense, inputs), loop(model, inputs), **EXACT)
    # all but the warm-up should have selected tokens
    assert specdiff.stats(dense).fallbacks == {"no tokens can be selected": STEPS - 3}
    reason = "internal error: RuntimeError: a fault of ours"
    assert f"no tokens can be selected: {reason}" in caplog.messages
    assert any(record.exc_info for record in caplog.records)


# explain ----------------------------------------------------------------------------------------


def test_error_in_writing_a_program_runs_dense(small, monkeypatch, caplog):
    """Programs are written when they are first run: a fault in one is not the user's, either."""
    model, inputs = small
    exact = loop(model, inputs)
    selective = compiled(model)

    def failing(*_: Any) -> None:
        raise RuntimeError("broken emitter")

    monkeypatch.setattr("specdiff.passes.emit.lower.emit_selective", failing)
    for _ in range(2):
        torch.testing.assert_close(loop(selective, inputs), exact, **EXACT)
    assert counts(model) == (2 * STEPS, 0, 0, 1)
    (reason,) = specdiff.stats(model).fallbacks
    assert reason.startswith("internal error: no program") and "broken emitter" in reason
    assert caplog.text.count("specdiff failed on a graph") == 1


def test_no_program_at_all_runs_the_graph_as_it_came(small, monkeypatch):
    model, inputs = small
    exact = loop(model, inputs)

    def failing(*_: Any) -> None:
        raise RuntimeError("several\nlines")

    monkeypatch.setattr("specdiff.passes.emit.lower.Lowered._build", failing)
    torch.testing.assert_close(loop(compiled(model), inputs), exact, **EXACT)
    assert counts(model) == (STEPS, 0, 0, 0)
    (reason,) = specdiff.stats(model).fallbacks
    assert reason.endswith("several")


def test_a_program_that_fails_when_first_run_is_no_fault_of_the_users(small, monkeypatch):
    model, inputs = small
    exact = loop(model, inputs)
    build = Lowered._build

    def building(self: Lowered, name: str, *rest: Any) -> Any:
        def run(_: Any) -> Any:
            raise RuntimeError("wrong dtype")

        return run if name.startswith("selective") else build(self, name, *rest)

    monkeypatch.setattr(Lowered, "_build", building)
    torch.testing.assert_close(loop(compiled(model), inputs), exact, **EXACT)
    (reason,) = specdiff.stats(model).fallbacks
    assert "wrong dtype" in reason


def test_a_graph_within_the_graph_runs_dense(small, caplog):
    model, inputs = small

    class Choosing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **given: Any) -> Any:
            (output,) = self.inner(**given)
            parts = [lambda x: x.sin(), lambda x: x.cos()]
            return (torch.cond(output.sum() > 0, *parts, (output,)),)

    choosing = Choosing()
    torch.testing.assert_close(loop(compiled(choosing), inputs), loop(choosing, inputs), **EXACT)
    assert specdiff.stats(choosing).fallbacks == {"no tokens can be selected": STEPS - 3}
    (reason,) = [said for said in caplog.messages if said.startswith("no tokens can be selected")]
    assert "a graph of its own" in reason


@pytest.mark.parametrize(
    ("build", "tokens", "text", "kept"), [(flux, 42, 4, 0.1), (sd3, 48, 5, 0.2)]
)  # a batch of two may hold guidance
def test_explain(build, tokens, text, kept):
    model, inputs = build()
    report = specdiff.explain(model, **inputs)
    assert report.selective
    assert report.reason == ""
    assert sorted((s.length, s.prunable) for s in report.segments) == [
        (text, False),
        (tokens, True),
    ]
    names = {segment.prunable: segment.name for segment in report.segments}
    assert names[False] == "encoder_hidden_states"
    page = str(report)
    assert page.startswith(f"step plan: yes, keeps at most {kept} MiB a generation\n")
    assert "\ntoken selection: yes\n" in page
    assert f"{names[True]}: {tokens} tokens, prunable" in page
    assert f"{names[False]}: {text} tokens, always computed" in page
    assert report.cache_bytes > 0
    assert report.step_flops(tokens // 10) < report.step_flops() / 2


@pytest.mark.slow
def test_explain_leaves_a_compiled_model_alone(small):
    model, inputs = small
    selective = compiled(model)
    before = loop(selective, inputs)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            assert specdiff.explain(selective, **inputs).selective
    after = loop(selective, inputs)
    assert torch.equal(torch.stack(before), torch.stack(after))
    found = specdiff.stats(selective)
    assert (found.graphs, found.recompiles) == (1, 0)
    assert counts(selective) == (6, 14, 0, 2)


@pytest.mark.slow
def test_explain_does_not_use_up_the_limit_on_variants(small):
    model, inputs = small
    for rows in range(2, 3 + torch._dynamo.config.recompile_limit):
        _, other = flux(rows=rows, columns=5, batch=1)  # and no shape makes another symbolic
        report = specdiff.explain(model, **other)
        assert report.selective, report.reason
    selective = compiled(model)
    loop(selective, inputs)
    assert counts(selective) == (3, 7, 0, 1)


def test_explain_of_a_model_that_needs_gradients_says_so_only_when_run(small):
    """`explain` asks about inference, whatever the grad mode it is called under."""
    model, inputs = small
    assert next(model.parameters()).requires_grad
    assert specdiff.explain(model, **inputs).selective


# Dynamo -----------------------------------------------------------------------------------------


def test_one_graph_and_no_recompile(small):
    model, inputs = small
    counters.clear()
    selective = compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        loop(selective, inputs)
        loop(selective, inputs)
    assert (specdiff.stats(selective).graphs, specdiff.stats(selective).recompiles) == (1, 0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_loop_itself_does_not_recompile_other_backends(small):
    """What the test above relies on: Dynamo counts one frame for this loop."""
    model, inputs = small
    counter = CompileCounter()
    loop(torch.compile(model, backend=counter), inputs)
    assert counter.frame_count == 1


FIFTEEN = [
    {"cache_ratio": ratio, "forecast": forecast}
    for ratio in (0.25, 0.5, 0.75, 0.9, 0.95)
    for forecast in ("reuse", "linear", "mean")
]


def test_fifteen_settings_on_one_model(small):
    model, inputs = small
    exact = loop(model, inputs)
    selective = compiled(model, cache_ratio=0)
    torch.testing.assert_close(loop(selective, inputs), exact, **EXACT)
    results = []
    for settings in FIFTEEN:
        specdiff.reset(selective)
        specdiff.configure(selective, **settings)
        results.append(loop(selective, inputs))
        assert counts(selective) == (3, 7, 0, 1)
        torch.testing.assert_close(results[-1][:3], exact[:3], **EXACT)
        assert all(velocity.isfinite().all() for velocity in results[-1])
        assert not torch.allclose(results[-1][3], exact[3], **EXACT)
    assert len({tuple(result[-1].flatten().tolist()) for result in results}) == len(FIFTEEN)
    specdiff.configure(selective, cache_ratio=0)
    torch.testing.assert_close(loop(selective, inputs), exact, **EXACT)
    assert specdiff.stats(selective).graphs == 1


@pytest.mark.slow
def test_fifteen_compilations_of_one_model(small):
    """Each set of options is a variant to Dynamo; after eight it runs the untouched model."""
    model, inputs = small
    exact = loop(model, inputs)
    limit = torch._dynamo.config.recompile_limit
    for index, settings in enumerate(FIFTEEN):
        variant = torch.compile(
            model, backend="specdiff", options={"inner_backend": "eager", **THREE_DENSE, **settings}
        )
        result = loop(variant, inputs)
        found = specdiff.stats(variant)
        torch.testing.assert_close(result[:3], exact[:3], **EXACT)
        assert found.graphs == min(index + 1, limit)
        if index >= limit:
            torch.testing.assert_close(result, exact, **EXACT)
            assert found.selective == 7 * limit
        else:
            assert not torch.allclose(result[3], exact[3], **EXACT)


def test_beyond_the_limit_fullgraph_raises(small):
    model, inputs = small
    with torch._dynamo.config.patch(recompile_limit=2):
        for steps in (1, 2):
            loop(compiled(model, plan=Plan.warmup(steps)), inputs, 1)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            loop(compiled(model, plan=Plan.warmup(3)), inputs, 1)


def test_dynamo_reset(small):
    model, inputs = small
    selective = compiled(model)
    before = loop(selective, inputs)
    torch._dynamo.reset()
    after = loop(selective, inputs)
    torch.testing.assert_close(after, before, **EXACT)
    assert counts(selective)[:2] == (6, 14)


def test_deep_copies_have_a_state_of_their_own(small):
    model, inputs = small
    other = copy.deepcopy(model)
    first, second = compiled(model), compiled(other)
    specdiff.configure(second, cache_ratio=0.5)
    one = loop(first, inputs)
    assert counts(first) == (3, 7, 0, 1)
    two = loop(second, inputs, 5)
    assert counts(first) == (3, 7, 0, 1)
    assert counts(second) == (3, 2, 0, 1)
    assert not torch.equal(one[4], two[4])
    specdiff.reset(first)
    assert counts(first) == (0, 0, 0, 0)
    assert counts(second) == (3, 2, 0, 1)
