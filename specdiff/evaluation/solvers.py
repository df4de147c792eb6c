"""Solvers: samplers of higher order, rivals at as many evaluations, as diffusers ships them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from specdiff.evaluation.method import Candidate, Prepared, compile_whole

EVALUATIONS = (10, 15)
LEAST = 1e-4
"""Sigma in place of 0 where a solver takes its logarithm."""

Make = Callable[[Any], Any]
"""A scheduler in place of a pipeline's own, of the same shift."""


def solvers() -> list[Candidate]:
    """Each solver, for a few numbers of steps, which are evaluations; of Heun's all but one two."""
    return [
        Candidate(
            f"{name}, {count} steps", name, count, {"steps": count}, _with(make), is_peer=True
        )
        for name, make in SOLVERS.items()
        for count in (EVALUATIONS if name != HEUN else [(n + 1) // 2 for n in EVALUATIONS])
    ]


def _with(make: Make) -> Callable[[Any], Prepared]:
    def prepare(pipeline: Any) -> Prepared:
        pipeline.scheduler = make(pipeline.scheduler)
        return compile_whole(pipeline)

    return prepare


def _adams_bashforth(scheduler: Any) -> Any:
    base = type(scheduler)

    class AdamsBashforth(base):  # type: ignore[misc, valid-type]
        """Euler's steps along the mean of the line through two velocities: order two."""

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            """Begin a generation."""
            super().set_timesteps(*args, **kwargs)
            self.before: Tensor | None = None

        def step(self, velocity: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            """As of the base."""
            if self.step_index is None:
                self._init_step_index(timestep)
            mean, index = velocity, self.step_index
            if self.before is not None:
                last, here, there = self.sigmas[index - 1 : index + 2].tolist()
                mean = velocity + (velocity - self.before) * ((there - here) / (here - last) / 2)
            self.before = velocity
            return super().step(mean, timestep, sample, **kwargs)

    return AdamsBashforth.from_config(scheduler.config)


def _of_diffusers(kind: str, order: int | None = None, last: float = 0.0) -> Make:
    def make(scheduler: Any) -> Any:
        import diffusers

        base, shift = getattr(diffusers, kind), scheduler.config.shift

        class Shifted(base):  # type: ignore[misc, valid-type]
            """Takes neither shift nor sigmas from the pipeline, as FLUX's hands them over."""

            def set_timesteps(
                self, count: int | None = None, device: Any = None, sigmas: Any = None, **_: Any
            ) -> None:
                """Begin a generation."""
                super().set_timesteps(count or len(sigmas), device=device)
                self.sigmas[-1] = last

        if order is None:
            return Shifted(shift=shift)
        return Shifted(
            solver_order=order,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )

    return make


HEUN = "Heun"
SOLVERS: dict[str, Make] = {
    "Adams-Bashforth 2": _adams_bashforth,
    HEUN: _of_diffusers("FlowMatchHeunDiscreteScheduler"),
    "DPM-Solver++ 2M": _of_diffusers("DPMSolverMultistepScheduler", 2),
    "DPM-Solver++ 3M": _of_diffusers("DPMSolverMultistepScheduler", 3),
    "UniPC": _of_diffusers("UniPCMultistepScheduler", 2),
    "DEIS": _of_diffusers("DEISMultistepScheduler", 2, last=LEAST),
}
