"""Counters of one model and the snapshot that users read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

LAST_VARIANT = (
    "Dynamo compiles no more variants of this model, so calls that need another (one more adapter)"
    " run as plain PyTorch, uncounted: swap adapters in place, use specdiff.attach(model), or raise"
    " torch._dynamo.config.recompile_limit"
)


@dataclass
class Counters:
    """What has happened since the model was compiled or reset."""

    dense: int = 0
    selective: int = 0
    skipped: int = 0
    speculative: int = 0
    tokens_computed: int = 0
    tokens_total: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    token_counts: Callable[[], Tensor] | None = None
    """Gives those of the latest stream, int32 [B, N]."""


@dataclass(frozen=True)
class Stats:
    """A snapshot of what the runtime did for one model."""

    dense: int
    """Evaluations that computed every token, fallbacks included."""
    selective: int
    """Evaluations that computed some of the tokens."""
    skipped: int
    """Evaluations that computed none: all tokens were forecast."""
    speculative: int
    """Extra dense evaluations made to look ahead."""
    tokens_computed: int
    """Image tokens computed, over all batch rows, speculative evaluations included."""
    tokens_total: int
    """Image tokens that a dense run would have computed."""
    cache_bytes: int
    """Bytes of key/value caches held by the model's graphs, idle ones included."""
    fallbacks: dict[str, int]
    """How often a step ran dense because a guard failed, by reason."""
    graphs: int
    """Compiled graphs that this model has run."""
    recompiles: int
    """Graphs beyond the first over one and the same set of parameters."""
    compile_seconds: dict[str, float]
    """Seconds spent compiling, by program, summed over graphs."""
    token_counts: Tensor | None
    """int32 [B, N]: how often each token of the latest stream was computed in its generation."""
    no_step_plan: str | None = None
    """Why no whole steps can be forecast; empty if they can, None where nothing has run yet."""
    no_selection: str | None = None
    """Why no tokens can be selected; empty if they can, None where nothing has run yet."""
    kept_bytes: int = 0
    """Bytes of latents and predictions kept for forecasts of rows (`specdiff.rows`), as the option
    `max_cache_bytes` counts them, after the latest call with rows."""
    last_variant: bool = False
    """Whether Dynamo compiles no more variants of the model, its limit being reached: calls that
    need another run as plain PyTorch and are not counted here."""

    @property
    def evaluations(self) -> int:
        """Calls answered: dense, selective and skipped."""
        return self.dense + self.selective + self.skipped

    def __str__(self) -> str:
        steps = (
            f"{self.evaluations} evaluations: {self.dense} dense, {self.selective} selective,"
            f" {self.skipped} skipped; {self.speculative} speculative"
        )
        share = self.tokens_computed / self.tokens_total if self.tokens_total else 1.0
        tokens = f"tokens computed: {self.tokens_computed} of {self.tokens_total} ({share:.1%})"
        reasons = [f"{reason} x{count}" for reason, count in self.fallbacks.items()]
        seconds = [f"{name} {value:.1f} s" for name, value in self.compile_seconds.items()]
        lines = [
            steps,
            tokens,
            f"step plan: {in_words(self.no_step_plan)}",
            f"token selection: {in_words(self.no_selection)}",
            f"caches: {self.cache_bytes / 2**20:.1f} MiB",
            *([f"kept of rows: {self.kept_bytes / 2**20:.1f} MiB"] if self.kept_bytes else []),
            f"dense by guard: {', '.join(reasons) or 'never'}",
            f"graphs: {self.graphs}, recompiles: {self.recompiles}",
            f"compile time: {', '.join(seconds) or 'none'}",
            *([LAST_VARIANT] if self.last_variant else []),
        ]
        return "\n".join(lines)


def in_words(why_not: str | None) -> str:
    """Yes, or no and why; "not known yet" for None."""
    if why_not is None:
        return "not known yet"
    return f"no, because {why_not}" if why_not else "yes"
