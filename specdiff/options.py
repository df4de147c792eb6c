"""Options of the backend: one frozen dataclass, validated when built, resolved once per method."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import OptionError
from specdiff.plan import Plan
from specdiff.settings import (
    ABLATIONS,
    DEFAULT,
    METHODS,
    OFF,
    PLAN_OPTIONS,
    QUALITIES,
    SOLUTION_PLANS,
    TRUSTED,
    Settings,
)

FORECASTS = ("reuse", "linear", "mean")
TARGETS = ("dense", "solution")
TEXT_STEPS = ("all", "dense")
PREDICTIONS = ("auto", "flow", "epsilon", "v")
INNER_BACKENDS = ("inductor", "aot_eager", "eager")
KV_CACHE_DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
NO_LONGER = {
    "warmup_steps": "write plan=specdiff.Plan.warmup({value}), or warmup={value} in another plan",
    "refresh_interval": "write plan=specdiff.Plan.tapered({value}) or Plan.every({value})",
    "tapered": "write plan=specdiff.Plan.tapered(4) or specdiff.Plan.every(4)",
    "stride": "write the skips into a plan: specdiff.Plan((0, 1, 0.9, 1, 0))",
    "speculative_steps": "write lookahead={value} in a plan: Plan.tapered(lookahead={value})",
    "text_refresh": 'write text_steps="all" (was 1) or text_steps="dense" (was 0)',
    "correction": 'leave it out: only method="paper" goes without',
    "reuse_share": 'leave it out, or write method="paper"',
    "starvation": 'leave it out, or write method="paper"',
    "selective_importance": "leave it out: steps that select tokens measure importance",
    "importance_queries": "leave it out",
}
"""Options of earlier versions, and what to write instead."""


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _falling(value: Any) -> bool:
    shares = isinstance(value, tuple) and len(value) > 1 and all(map(_share, value))
    return shares and bool(value[0] > value[-1])


def _count(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low


def _option(
    default: object,
    valid: str,
    test: Callable[[Any], bool],
    *,
    runtime: bool = True,
    public: bool = True,
) -> Any:
    """A field with its validity rule; `runtime` fields can change without recompiling."""
    metadata = {"valid": valid, "test": test, "runtime": runtime, "public": public}
    return dataclasses.field(default=default, metadata=metadata)


def _choice(default: str | None, names: tuple[str, ...], *, runtime: bool = True) -> Any:
    valid = "one of " + ", ".join(repr(name) for name in names)
    return _option(default, valid, names.__contains__, runtime=runtime)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="specdiff", options=...)` accepts.

    Fields that are None by default and not documented otherwise take the value of the plan, else
    that of the method. Raises `OptionError` for a value that is out of range or of the wrong type.
    """

    quality: str | None = _choice(None, (OFF, *QUALITIES))
    """How close to the dense pictures to stay, closest and slowest first: "dense" runs the model's
    own graph, whatever else is given; "closest", "near-lossless", "balanced" and "fast" are plans
    (`QUALITIES`). None: "balanced"; for method "paper" its own plan."""

    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = _option(  # noqa: RUF009
        None,
        "a Plan, a file made by `specdiff tune` or by hand, or what it holds",
        lambda v: isinstance(v, (Plan, Mapping, str, os.PathLike)),
    )
    """Which evaluations are dense, in place of a quality; more of them are slower and closer to the
    dense picture. May hold the options `PLAN_OPTIONS`. Kept as a `Plan`."""

    cache_ratio: float | None = _option(None, "a number from 0 to 1", _share)
    """Share of image tokens not computed in the gaps of the plan (the paper's CR): higher is faster
    and further from the dense picture. 1: gaps are forecast whole; 0: they are dense. None: 1, or
    0.9 for the plan of method "paper"."""

    method: str | None = _choice(None, tuple(METHODS))
    """How tokens are scored and forecast, and by which plan. "history" (None): by what each token
    did, errors made good once tokens are computed again. "paper": the paper to the letter."""

    forecast: str | None = _choice(None, FORECASTS)
    """How tokens that are not computed are predicted: "reuse" repeats a token's last computed
    output, "linear" continues its last two, "mean" is the paper's weighted mean of the last three
    steps (equation 6). None: "linear"; for method "paper" "mean"."""

    text_steps: str | None = _choice(None, TEXT_STEPS)
    """Which steps compute the text tokens: "all" (None) that compute any token; or "dense" ones
    alone, between which their cached keys and values serve. "dense" is faster and further from the
    dense picture. No effect where all gaps are skipped, nor on attached models."""

    target: str = _choice("dense", TARGETS)
    """What pictures are to be close to: "dense" to those of the model without acceleration, or
    "solution" to where the sampler would get with very many steps."""

    guidance_scale: float | None = _option(None, "a number, or None", _number)
    """Where a call's batch holds both halves of classifier-free guidance, in either order:
    importance is summed over the halves and both compute the same tokens. None: learned from the
    first steps."""

    prediction: str = _choice("auto", PREDICTIONS)
    """What the model predicts, for the jumps of self-speculation: the velocity of a "flow",
    "epsilon" or "v"; "auto": what fits the sampler's first step best."""

    alphas_cumprod: Sequence[float] | Tensor | None = _option(  # noqa: RUF009
        None, "falling numbers from 0 to 1, one for each time, or None", _falling
    )
    """The noise schedule of "epsilon" and "v", as diffusers' schedulers have it; None: whichever of
    the usual ones fits best. Kept as a tuple."""

    timestep_arg: str | None = _option(
        None,
        "a non-empty string, or None",
        lambda v: isinstance(v, str) and v != "",
        runtime=False,
    )
    """Name of the forward argument that holds the time; None: found by its usual names."""

    max_cache_bytes: int | None = _option(None, "an integer of at least 0, or None", _count(0))
    """Limit on the bytes of all key/value caches of one compiled graph, or of one shape of a graph
    that takes several: lower holds less memory, and steps that would need more run dense. Where a
    single set of caches exceeds it, none is allocated; else the memory in which dense steps without
    caches leave theirs, as large as one cache, comes on top. With `specdiff.rows`: limit on what
    all that were named keep for forecasts; the oldest gives way, and runs dense for two steps."""

    kv_cache_dtype: str | None = _choice(None, tuple(KV_CACHE_DTYPES), runtime=False)
    """Codes in which caches hold the keys and values of attentions: "int8" or "fp8_e4m3", each with
    a float32 scale for a token and head; None: the model's dtype. What else lives in caches keeps
    that too, and so does what cannot be coded (`specdiff.explain` says why)."""

    inner_backend: str = _choice("inductor", INNER_BACKENDS, runtime=False)
    """What compiles the emitted programs."""

    dump_dir: str | os.PathLike[str] | None = _option(  # noqa: RUF009
        None, "a path, or None", lambda v: isinstance(v, (str, os.PathLike)), runtime=False
    )
    """Directory for runnable code after each pass, drawings of the graph and a report; None: what
    the environment variable SPECDIFF_DUMP names, if it is set."""

    ablation: Mapping[str, Any] | None = _option(
        None,
        f"an object with some of {', '.join(ABLATIONS)}",
        lambda v: isinstance(v, Mapping) and set(v) <= set(ABLATIONS),
        public=False,
    )
    """Not an option for users: constants of the methods that our own experiments change."""

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        table = getattr(table, "tolist", lambda: table)()  # numpy has it, too
        if isinstance(table, list):
            object.__setattr__(self, "alphas_cumprod", tuple(table))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if value is None and "None" in field.metadata["valid"]:
                continue
            _check(field, value)
        if self.plan is not None:
            object.__setattr__(self, "plan", self._checked_plan(Plan.load(self.plan)))

    def _checked_plan(self, plan: Plan) -> Plan:
        for name, value in plan.settings.items():
            if name not in PLAN_OPTIONS:
                raise OptionError("plan: settings." + _unknown(name, value, list(PLAN_OPTIONS)))
            _check(_FIELDS[name], value, "plan: settings.")
        if self.quality not in (None, OFF):
            raise OptionError("quality: the plan takes its place, give one of them")
        return plan

    @classmethod
    def parse(
        cls, mapping: Mapping[str, Any], inductor_keys: Collection[str]
    ) -> tuple[Options, dict[str, Any]]:
        """Split what `torch.compile(options=...)` was given into ours and Inductor's.

        Args:
            mapping: option names and values; may also hold `mode`.
            inductor_keys: names of all Inductor settings, with underscores, dots where nested;
                `mapping` may have them with dashes, as `torch.compile` does.

        Returns:
            The options, and the settings (`mode` included) to hand to Inductor.

        Raises:
            OptionError: a name that is neither, a mode that torch has not, or a value out of range.
        """
        ours = {name: value for name, value in mapping.items() if name in _FIELDS}
        inductor = {
            name.replace("-", "_"): value for name, value in mapping.items() if name not in _FIELDS
        }
        known = {"mode", *inductor_keys}
        for name in inductor:
            if name not in known:
                raise OptionError(_unknown(name, mapping.get(name), list(OPTIONS), sorted(known)))
        if "mode" in inductor:
            from specdiff.torch_adapter import mode_settings

            mode_settings(inductor["mode"])
        return cls(**ours), inductor

    @property
    def kv_cache_code(self) -> torch.dtype | None:
        """`kv_cache_dtype` as torch has it."""
        return None if self.kv_cache_dtype is None else KV_CACHE_DTYPES[self.kv_cache_dtype]

    def override(self, overrides: Mapping[str, Any]) -> Options:
        """These options with some replaced."""
        return dataclasses.replace(self, **overrides) if overrides else self

    def resolve(self) -> Settings:
        """The runtime's settings: what is left None takes a default."""
        given = self.plan if isinstance(self.plan, Plan) else None
        held = given.settings if given else {}
        method = self.method or held.get("method", next(iter(METHODS)))
        plan = given or self._planned(method)
        values = {"cache_ratio": 1.0, "text_steps": "all", **METHODS[method], **plan.settings}
        for field in dataclasses.fields(Settings):
            value = getattr(self, field.name, None)
            if value is not None or field.name not in values:
                values[field.name] = value
        changed = {n: v for n, v in (self.ablation or {}).items() if n != "importance_queries"}
        fixed = {"method": method, "plan": plan, "accelerated": self.quality != OFF}
        if given:
            fixed["few"] = fixed["trusted"] = 0
        elif values["trusted"]:
            values["trusted"] = TRUSTED.get(self.quality or "", values["trusted"])
        return Settings(**{**values, **changed, **fixed})

    def _planned(self, method: str) -> Plan:
        """By the quality, where no plan is given; a method may have a plan for want of both."""
        if self.quality == OFF:
            return Plan.every(1)
        own: Plan | None = METHODS[method].get("plan") if self.quality is None else None
        plans = SOLUTION_PLANS if self.target == "solution" else QUALITIES
        return own or plans[self.quality or DEFAULT]


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}
OPTIONS = tuple(name for name, field in _FIELDS.items() if field.metadata["public"])
RUNTIME_OPTIONS = tuple(name for name in OPTIONS if _FIELDS[name].metadata["runtime"])


def check_overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate options for a compiled model or a session.

    Returns:
        The options, and None for those of earlier ones that they take the place of: a plan or a
        quality replaces an earlier one, with what was to fill its gaps. "dense" replaces none: what
        it switches off is kept.

    Raises:
        OptionError: an unknown name, an option fixed at compile time, or a value out of range.
    """
    for name, value in options.items():
        if name not in _FIELDS:
            raise OptionError(_unknown(name, value, list(RUNTIME_OPTIONS)))
        if not _FIELDS[name].metadata["runtime"]:
            raise OptionError(
                f"{name}: fixed when the model is compiled, give it to torch.compile(options=...);"
                f" options that can change: {', '.join(RUNTIME_OPTIONS)}"
            )
    checked = Options(**options)
    replaces = options.get("plan") is not None or options.get("quality") not in (None, OFF)
    replaced = ("plan", "quality", "cache_ratio") if replaces else ()
    return {name: getattr(checked, name) for name in (*replaced, *options)}


def _check(field: dataclasses.Field[Any], value: object, where: str = "") -> None:
    if not field.metadata["test"](value):
        shown = reprlib.repr(value)
        raise OptionError(f"{where}{field.name}={shown}: must be {field.metadata['valid']}")


def _unknown(name: str, value: object, listed: list[str], others: Sequence[str] = ()) -> str:
    """What to write instead of a name that is no option's."""
    if name in NO_LONGER:
        return f"{name}: gone; {NO_LONGER[name].format(value=value)}"
    close = difflib.get_close_matches(name, [*listed, *others], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name}: no such option{hint}; options: {', '.join(listed)}"
