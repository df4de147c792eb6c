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
    METHOD_DEFAULTS,
    METHODS,
    PLAN_SETTINGS,
    QUALITIES,
    SCHEDULE,
    USUAL,
    Settings,
)

FORECASTS = ("reuse", "linear", "quadratic", "mean", "mean-1000")
PREDICTIONS = ("auto", "flow", "epsilon", "v")
INNER_BACKENDS = ("inductor", "aot_eager", "eager")
KV_CACHE_DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


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
    default: object, valid: str, test: Callable[[Any], bool], *, runtime: bool = True
) -> Any:
    """A field with its validity rule; `runtime` fields can change without recompiling."""
    metadata = {"valid": valid, "test": test, "runtime": runtime}
    return dataclasses.field(default=default, metadata=metadata)


def _choice(default: str | None, names: tuple[str, ...], *, runtime: bool = True) -> Any:
    valid = "one of " + ", ".join(repr(name) for name in names)
    return _option(default, valid, names.__contains__, runtime=runtime)


def _switch() -> Any:
    return _option(None, "True or False", lambda v: isinstance(v, bool))


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="specdiff", options=...)` accepts.

    Fields that are None by default and not documented otherwise take the value of `plan`, else the
    default of `method` (`METHOD_DEFAULTS`). Raises `OptionError` for a value that is out of range
    or of the wrong type.
    """

    quality: str | None = _choice(None, tuple(QUALITIES))
    """How close to the dense pictures to stay: "closest", "near-lossless", "balanced" or "fast":
    plans (`QUALITIES`), whose place options of `SCHEDULE` that are given take. None: "balanced" for
    "history", no plan for "paper"."""

    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = _option(  # noqa: RUF009
        None,
        "a file made by `specdiff tune` or by hand, or what it holds",
        lambda v: isinstance(v, (Plan, Mapping, str, os.PathLike)),
    )
    """What each evaluation computes, in place of the options of `SCHEDULE`, and settings for what
    is left None (`specdiff.plan`). Kept as a `Plan`."""

    cache_ratio: float | None = _option(None, "a number from 0 to 1", _share)
    """Share of image tokens that a selective step does not compute (the paper's CR). 0: all steps
    dense; 1: whole steps are skipped and forecast."""

    warmup_steps: int | None = _option(None, "an integer of at least 1", _count(1))
    """Dense evaluations at the start of every generation, the first included."""

    speculative_steps: int | None = _option(None, "an integer of at least 0", _count(0))
    """Evaluations of the paper's self-speculation. The first one is the first real step, so this
    costs `speculative_steps - 1` evaluations a generation; 0 or 1: no look ahead."""

    refresh_interval: int | None = _option(None, "an integer of at least 0", _count(0))
    """Every so many evaluations after warm-up are dense; 0: never, 1: all of them."""

    tapered: bool | None = _switch()
    """Whether dense evaluations follow each other closely at first, further and further apart up to
    `refresh_interval`, and the last two are dense; that they come is read off the times."""

    stride: int | None = _option(None, "an integer of at least 1", _count(1))
    """Between dense evaluations only every so many compute any token; the others are skipped, that
    is forecast whole. 1: nothing is skipped."""

    text_refresh: int | None = _option(None, "an integer of at least 0", _count(0))
    """Every so many selective evaluations after a dense one also compute the text tokens; in
    between, their cached keys and values serve. 1: all do; 0: only dense evaluations."""

    selective_importance: bool | None = _switch()
    """Whether selective evaluations measure importance anew, from the tokens that they compute;
    otherwise the last that was measured serves. On an H100 it took a tenth of SD3's step at 99 %.
    Either has programs of its own, compiled when they are first needed."""

    reuse_share: float | None = _option(None, "a number from 0 to 1", _share)
    """Share of the total score held by the lowest-scoring tokens, whose previous output is reused
    as it is (the paper's class C2) instead of forecast."""

    starvation: float | None = _option(
        None, "a number of at least 0", lambda v: _number(v) and v >= 0
    )
    """Scale s of the starvation factor exp(s * times cached) in the score (equation 2)."""

    forecast: str | None = _choice(None, FORECASTS)
    """How tokens that are not computed are predicted. From a token's own last computed outputs:
    "reuse", "linear", "quadratic". Equation 6 over the last three steps: "mean" with T in [0, 1],
    "mean-1000" with T in [0, 1000]."""

    correction: bool | None = _switch()
    """Whether what forecasts have cost the latent is made good when tokens are next computed: the
    output then is the model's own and what the latent is short of (`runtime.tokens.correction`)."""

    method: str | None = _choice(None, METHODS)
    """How tokens are scored: "history" (None) by attention times squared staleness, "paper" by
    equation 3; it also chooses the defaults of the options left None."""

    importance_queries: int | None = _option(
        32, "an integer of at least 1, or None for all queries", _count(1), runtime=False
    )
    """Query rows per attention, at most, that are sampled, evenly strided, to measure importance.
    Plans that select no tokens, as the default, measure none."""

    guidance_scale: float | None = _option(None, "a number, or None", _number)
    """Set where a call's batch holds both halves of classifier-free guidance, in either order:
    importance is summed over the halves and both compute the same tokens."""

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
    that takes several; steps that would need more run dense. Where a single set of caches exceeds
    it, none is allocated; else the memory in which dense steps without caches leave theirs, as
    large as one cache, comes on top."""

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
            if name not in PLAN_SETTINGS:
                raise OptionError("plan: settings." + _unknown(name, list(PLAN_SETTINGS)))
            _check(_FIELDS[name], value, "plan: settings.")
        for name in (*SCHEDULE, "quality"):
            if getattr(self, name) is not None:
                raise OptionError(f"{name}: the plan takes its place, give one of them")
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
                raise OptionError(_unknown(name, list(_FIELDS), sorted(known)))
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
        planned = given.settings if given else {}
        method = self.method or planned.get("method", METHODS[0])
        defaults = {**METHOD_DEFAULTS[method], **planned}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(Settings):
            value = getattr(self, field.name)
            values[field.name] = defaults.get(field.name) if value is None else value
        return Settings(**{**values, "method": method, "plan": given or self._of_quality(method)})

    def _of_quality(self, method: str) -> Plan | None:
        quality = self.quality or (USUAL if method == "history" else None)
        said = any(getattr(self, name) is not None for name in SCHEDULE)
        return None if said or quality is None else QUALITIES[quality]


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}
RUNTIME_OPTIONS = tuple(name for name, field in _FIELDS.items() if field.metadata["runtime"])


def check_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate settings for a compiled model or a session.

    Returns:
        The settings, and None for those of earlier ones that they take the place of: a plan or a
        quality replaces a schedule given earlier, and options of the schedule an earlier plan.

    Raises:
        OptionError: an unknown name, an option fixed at compile time, or a value out of range.
    """
    for name in settings:
        if name not in _FIELDS:
            raise OptionError(_unknown(name, list(RUNTIME_OPTIONS)))
        if name not in RUNTIME_OPTIONS:
            raise OptionError(
                f"{name}: fixed when the model is compiled, give it to torch.compile(options=...);"
                f" settings that can change: {', '.join(RUNTIME_OPTIONS)}"
            )
    checked = Options(**settings)
    given = {name for name, value in settings.items() if value is not None}
    replaced: tuple[str, ...] = ()
    if given & {"plan", "quality"}:
        replaced = ("plan", "quality", *SCHEDULE)
    elif given.intersection(SCHEDULE):
        replaced = ("plan",)
    return {name: getattr(checked, name) for name in (*replaced, *settings)}


def _check(field: dataclasses.Field[Any], value: object, where: str = "") -> None:
    if not field.metadata["test"](value):
        shown = reprlib.repr(value)
        raise OptionError(f"{where}{field.name}={shown}: must be {field.metadata['valid']}")


def _unknown(name: str, listed: list[str], others: Sequence[str] = ()) -> str:
    close = difflib.get_close_matches(name, [*listed, *others], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name}: no such option{hint}; options: {', '.join(listed)}"
