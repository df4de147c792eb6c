"""Plain: a report as values that `json.dump` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from specdiff.inspect.report import RATIOS, Report
from specdiff.measure.machine import MachineRates
from specdiff.passes.select.cost import Work
from specdiff.passes.select.regions import Region

SCHEMA = 1
"""Number of the record's layout; grows when a field changes its meaning or goes away."""


def to_json(report: Report, rates: MachineRates | None = None, steps: int = 28) -> dict[str, Any]:
    """All of a report; with the rates of a machine also times, in seconds."""
    if not report.selective:
        return {
            "schema": SCHEMA,
            "selective": False,
            "reason": report.reason,
            "no_step_plan": report.no_step_plan,
            "kept_bytes": report.kept_bytes,
        }
    settings = dataclasses.asdict(report.settings)
    settings["alphas_cumprod"] = settings["alphas_cumprod"] and list(settings["alphas_cumprod"])
    return {
        "schema": SCHEMA,
        "selective": True,
        "reason": "",
        "no_step_plan": "",
        "kept_bytes": report.kept_bytes,
        "denoises": list(report.latents),
        "segments": [dataclasses.asdict(segment) for segment in report.segments],
        "sizes": {"B": report.sizes.batch, "N": report.sizes.tokens, "T": report.sizes.text},
        "regions": [_region(report, region) for region in report.regions],
        "whole": [dataclasses.asdict(op) for op in report.whole],
        "cache_bytes": report.cache_bytes,
        "cache_formula": str(report.cache_formula),
        "caches_not_coded": dict(report.uncoded),
        "cost": _cost(report),
        "settings": settings,
        "schedule": [
            {"kind": kind, "active": count, "reason": why}
            for kind, count, why in report.schedule(steps)
        ],
        "prediction": _prediction(report, rates, steps),
        "passes": [dataclasses.asdict(record) for record in report.passes],
    }


def _region(report: Report, region: Region) -> dict[str, Any]:
    return {
        "kind": region.kind,
        "path": region.path,
        "ops": len(region.nodes),
        "shrinks": region.shrinks,
        "dense": _work(report, region.dense_work),
        "selective": _formulas(region.selective_work),
        "cache_bytes": report.sizes.evaluate(region.cache_bytes),
    }


def _work(report: Report, work: Work, active: int | None = None) -> dict[str, Any]:
    evaluate = report.sizes.evaluate
    values = {"flops": evaluate(work.flops, active), "bytes": evaluate(work.moved, active)}
    return {**values, "formulas": _formulas(work)}


def _formulas(work: Work) -> Mapping[str, str]:
    return {"flops": str(work.flops), "bytes": str(work.moved)}


def _cost(report: Report) -> dict[str, Any]:
    dense, selective = report.dense_work, report.selective_work
    at = [
        {
            "cache_ratio": ratio,
            "active": report.active_at(ratio),
            **_work(report, selective, report.active_at(ratio)),
            "speedup": report.step_flops() / report.step_flops(report.active_at(ratio)),
        }
        for ratio in RATIOS
    ]
    for item in at:
        del item["formulas"]
    return {
        "dense": _work(report, dense),
        "selective": {"formulas": _formulas(selective), "at": at},
        "speedup": str(report.speedup),
    }


def _prediction(report: Report, rates: MachineRates | None, steps: int) -> dict[str, Any] | None:
    if rates is None:
        return None
    bounds = report.predict(rates, steps)
    return {
        "rates": dataclasses.asdict(rates),
        "steps": steps,
        **dataclasses.asdict(bounds),
        "speedup": bounds.speedup,
    }
