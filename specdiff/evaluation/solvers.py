"""Solvers: samplers of higher order, rivals at as many evaluations, as diffusers ships them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from specdiff.evaluation.method import Candidate, Prepared, compile_whole

EVALUATIONS = (10, 15)
MULTISTEP: Mapping[str, tuple[str, int]] = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", 2),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", 3),
    "UniPC": ("UniPCMultistepScheduler", 2),
}


def solvers() -> list[Candidate]:
    """Each solver, for a few numbers of steps, which are evaluations."""
    return [
        Candidate(
            f"{name}, {count} steps", name, count, {"steps": count}, _with(name), is_peer=True
        )
        for name in MULTISTEP
        for count in EVALUATIONS
    ]


def _with(name: str) -> Callable[[Any], Prepared]:
    def prepare(pipeline: Any) -> Prepared:
        pipeline.scheduler = _scheduler(*MULTISTEP[name], pipeline.scheduler.config.shift)
        return compile_whole(pipeline)

    return prepare


def _scheduler(kind: str, order: int, shift: float) -> Any:
    import diffusers

    base = getattr(diffusers, kind)

    class Shifted(base):  # type: ignore[misc, valid-type]
        """Takes no shift from the pipeline, which FLUX's hands over unasked."""

        def set_timesteps(self, count: int, device: Any = None, **_: Any) -> None:
            """Begin a generation."""
            super().set_timesteps(count, device=device)

    return Shifted(
        solver_order=order,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
