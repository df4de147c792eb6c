"""Page: a report as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from specdiff.inspect.drawing import COLOURS, to_dot, to_svg
from specdiff.inspect.graph import Drawing, block_graph, block_path, region_graph, short_count
from specdiff.inspect.report import RATIOS, Report, TimeBounds
from specdiff.measure.machine import MachineRates
from specdiff.passes.select.regions import Region

HARDLY_SEEN, PLAINLY_SEEN = 40, 30
"""PSNR in dB; a rule of thumb, and the page says so."""
KINDS: Mapping[str, str] = {
    "attention": "lets every token look at every other",
    "attention+mlp": "attention and MLP side by side, which share their last projection",
    "mlp": "works on each token by itself",
    "modulation": "turns time and prompt into scales and shifts; no tokens in it",
    "table": "positions of the tokens; nothing learned in it",
    "embed": "brings inputs to the width of the model",
    "head": "turns tokens into the prediction",
    "other": "anything else",
}
STEP_KINDS: Mapping[str, tuple[str, str]] = {
    "dense": ("#2166ac", "every token computed"),
    "selective": ("#67a9cf", "some tokens computed, the others predicted"),
    "skipped": ("#e66101", "nothing computed: predicted from earlier steps"),
    "fallback": ("#b2182b", "every token computed, because a check failed"),
}
"""By the kind of a step: its colour, and what the kind means."""


def environment() -> Environment:
    """The templates, with the filters that they use."""
    templates = Environment(
        loader=PackageLoader("specdiff.inspect"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        count=short_count,
        formula=pretty_formula,
        milliseconds=_milliseconds,
        mebibytes=_mebibytes,
        seen=_seen,
    )
    templates.globals.update(step_kinds=STEP_KINDS)
    return templates


def pretty_formula(formula: sympy.Expr) -> str:
    """A formula as it is written on paper."""
    text = str(sympy.factor_terms(sympy.expand(formula)))
    return text.replace("**2", "²").replace("**3", "³").replace("*", "·")


def _seen(psnr: float) -> str:
    """A PSNR in dB, in words."""
    if psnr >= HARDLY_SEEN:
        return "as a rule hardly visible"
    return "as a rule seen on a close look" if psnr >= PLAINLY_SEEN else "as a rule plain to see"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mebibytes(size: float) -> str:
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def report_page(
    report: Report, rates: MachineRates | None = None, steps: int = 28, name: str = "this model"
) -> str:
    """What `explain` found, as HTML."""
    template = environment().get_template("explain.html")
    return template.render(
        name=name, facts=report_facts(report, rates, steps), drawings=drawings(report)
    )


def report_facts(report: Report, rates: MachineRates | None, steps: int) -> dict[str, Any]:
    """The values of a report that the templates show."""
    if report.analysis is None:
        return {"report": report}
    prediction = report.predict(rates, steps) if rates else None
    return {
        "report": report,
        "kinds": _kinds(report),
        "colours": COLOURS,
        "costs": _costs(report, rates),
        "rates": rates,
        "steps": steps,
        "prediction": prediction,
        "schedule": planned_steps(report, prediction, steps),
        "counts": count_kinds([kind for kind, _, _ in report.schedule(steps)]),
        "evaluate": report.sizes.evaluate,
    }


def drawings(report: Report) -> dict[str, Any]:
    """The drawings of a report for the templates."""
    if report.analysis is None:
        return {}
    path = block_path(report.analysis)
    return {
        "regions": _drawn(region_graph(report.analysis)),
        "block": _drawn(block_graph(report.analysis, path)),
        "block_path": path,
    }


def _drawn(graph: Drawing[str]) -> dict[str, Any]:
    """The drawing, and its source, which is shown where Graphviz is not installed."""
    svg = to_svg(graph)
    return {"svg": svg and Markup(svg), "dot": to_dot(graph)}


def _kinds(report: Report) -> list[dict[str, Any]]:
    """Regions by kind, the costliest first."""
    groups: dict[str, list[Region]] = {}
    for region in report.regions:
        groups.setdefault(region.kind, []).append(region)
    total, evaluate = report.step_flops() or 1, report.sizes.evaluate
    rows = []
    for kind, regions in groups.items():
        flops = sum(evaluate(region.dense_work.flops) for region in regions)
        quarter = sum(evaluate(r.selective_work.flops, report.active_at(0.75)) for r in regions)
        rows.append(
            {
                "kind": kind,
                "meaning": KINDS[kind],
                "regions": len(regions),
                "ops": sum(len(region.nodes) for region in regions),
                "flops": flops,
                "share": flops / total,
                "left": quarter / flops if flops else 1.0,
                "cache": sum(evaluate(region.cache_bytes) for region in regions),
            }
        )
    return sorted(rows, key=lambda row: -row["flops"])


def _costs(report: Report, rates: MachineRates | None) -> list[dict[str, Any]]:
    """A dense step, and selective ones with fewer and fewer tokens."""
    rows = []
    for ratio in (0.0, *RATIOS):
        active = report.active_at(ratio)
        work = report.selective_work if ratio else report.dense_work
        flops = report.sizes.evaluate(work.flops, active)
        seconds = None
        if rates:
            seconds = report.step_seconds(rates, active if ratio else None)
        rows.append(
            {
                "ratio": ratio,
                "active": active,
                "flops": flops,
                "moved": report.sizes.evaluate(work.moved, active),
                "gain": report.step_flops() / flops,
                "seconds": seconds,
            }
        )
    return rows


def planned_steps(
    report: Report, prediction: TimeBounds | None, steps: int
) -> list[dict[str, Any]]:
    """The schedule for the timeline; without times all bars have the same height."""
    seconds = vars(prediction) if prediction else {}
    planned = [
        {
            "kind": kind,
            "share": count / report.sizes.tokens,
            "reason": reason,
            "seconds": seconds.get(kind),
        }
        for kind, count, reason in report.schedule(steps)
    ]
    return with_heights(planned)


def with_heights(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps with heights of bars from 0 to 1: by their time, or else by their active share."""
    known = [step["seconds"] for step in steps if step["seconds"]]
    most = max(known, default=0.0)
    return [{**s, "height": s["seconds"] / most if s["seconds"] else s["share"]} for s in steps]


def count_kinds(kinds: Sequence[str]) -> dict[str, int]:
    """How many steps are of each kind, for a legend."""
    return {kind: kinds.count(kind) for kind in STEP_KINDS if kind in kinds}
