"""What the training scripts share: stages, averaged weights, checkpoints, the loss curve.

A script subclasses `Training` with its data, its loss and its pictures. Time is counted per step,
so that a process that is paused for a while loses nothing of its budget.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor

STALL_FACTOR = 5.0
"""A step counts for at most this many median steps, so that a paused process loses no budget."""
WARM_UP_STEPS = 10
DECAY_SHARE = 0.7
"""Share of the last stage over which the learning rate falls to zero."""
STEPS_A_REPORT = 25
MUON_RATE = 3e-3
ADAMW_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the training.

    Attributes:
        batch: Pictures in a step.
        rate: Scale of the learning rates.
        ema_decay: Decay of the averaged weights at each step.
    """

    batch: int
    rate: float
    ema_decay: float


@dataclass
class Progressed:
    """Where the training stands; saved with every checkpoint."""

    stage: int = 0
    step: int = 0
    stage_step: int = 0
    stage_seconds: float = 0.0
    pictures: int = 0
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    """(step, stage, mean loss since the last entry)."""

    def advance(self, seconds: float, pictures: int) -> None:
        """Count one step."""
        self.step += 1
        self.stage_step += 1
        self.stage_seconds += seconds
        self.pictures += pictures


class Stopwatch:
    """Tells how many seconds of each step count as training time."""

    def __init__(self) -> None:
        self.durations: list[float] = []

    @property
    def typical(self) -> float:
        """Median duration of the last hundred steps, in seconds."""
        return statistics.median(self.durations[-100:])

    def count(self, seconds: float) -> float:
        """Return how much of a step counts: nothing of the first, which compiles."""
        self.durations.append(seconds)
        return min(seconds, STALL_FACTOR * self.typical) if len(self.durations) > 1 else 0.0


def draw_loss(losses: list[tuple[int, int, float]], file: Path) -> None:
    """Plot the training loss over steps, one line per stage."""
    figure = Figure(figsize=(7, 3.5), layout="tight")
    axis = figure.subplots()
    for stage in sorted({entry[1] for entry in losses}):
        points = [(step, loss) for step, at, loss in losses if at == stage]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"stage {stage + 1}")
    axis.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    if losses:
        axis.legend()
    figure.savefig(file, dpi=120)


def build_optimizers(model: torch.nn.Module, outer: tuple[str, ...]) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices, AdamW for `outer` (name prefixes) and all that is no matrix.

    The prefix "" leaves all to AdamW.
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and not name.startswith(outer)
        (hidden if inner else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def shifted_times(count: int, shift: float, device: torch.device) -> Tensor:
    """Draw the times that sampling visits, `[count]` in 0..1, moved towards noise by `shift`."""
    t = torch.rand(count, device=device)
    return shift * t / (1 + (shift - 1) * t)


class Training:
    """Model, averages, optimizers and progress of one run, with checkpoints in `work`.

    Args:
        model: The network, with its initial weights.
        outer: Name prefixes of the layers at the model's ends.
        stages: What to train in turn.
        arguments: Of the command line, see `parser`.
        weights: Name of the file with the averaged weights, without suffix.
        metadata: What to write into that file's header.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        outer: tuple[str, ...],
        stages: Sequence[Stage],
        arguments: argparse.Namespace,
        weights: str,
        metadata: dict[str, str],
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stages = stages
        self.budgets = [60.0 * minutes for minutes in arguments.minutes]
        self.work: Path = arguments.work
        self.model = model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.compiled: Any = torch.compile(self.model, dynamic=False)
        self.optimizers = build_optimizers(self.model, outer)
        self.weights, self.metadata = weights, metadata
        self.at = Progressed()
        self.console = Console()

    @property
    def stage(self) -> Stage:
        """The stage under way."""
        return self.stages[self.at.stage]

    def loss(self) -> Tensor:
        """Return the loss on a fresh batch."""
        raise NotImplementedError

    def draw(self, is_final: bool) -> None:
        """Write samples of the averaged weights; fewer on the way than at the end."""
        raise NotImplementedError

    def rate_scale(self) -> float:
        """Warm up at each stage, stay constant, fall to zero at the end of the last."""
        scale = min(1.0, (self.at.stage_step + 1) / WARM_UP_STEPS)
        if self.at.stage == len(self.stages) - 1:
            left = 1 - self.at.stage_seconds / self.budgets[-1]
            scale *= min(1.0, max(0.0, left) / DECAY_SHARE)
        return self.stage.rate * scale

    def step(self) -> float:
        """Make one optimizer step and return the loss."""
        scale = self.rate_scale()
        loss = self.loss()
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.stage.ema_decay, (1 + self.at.step) / (10 + self.at.step))
        averages, weights = list(self.average.parameters()), list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint, the shippable weights and the loss curve, each atomically."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "at": asdict(self.at),
            "random": torch.get_rng_state(),
        }
        torch.save(state, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")
        halves = {k: v.half().contiguous() for k, v in self.average.state_dict().items()}
        save_file(halves, self.work / "weights.tmp", metadata=self.metadata)
        (self.work / "weights.tmp").replace(self.work / f"{self.weights}.safetensors")
        (self.work / "loss.json").write_text(json.dumps(asdict(self.at)))

    def load(self) -> None:
        """Continue from the checkpoint in the work folder."""
        state = torch.load(self.work / "checkpoint.pt", map_location=self.device)
        torch.set_rng_state(state["random"].cpu())
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.at = Progressed(**state["at"])

    def run(self, save_seconds: float, sheet_seconds: float) -> None:
        """Train through all the stages that are left."""
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("training", total=sum(self.budgets))
            while True:
                for _ in self.run_stage(save_seconds, sheet_seconds):
                    done = sum(self.budgets[: self.at.stage]) + self.at.stage_seconds
                    progress.update(task, completed=done, description=f"stage {self.at.stage + 1}")
                if self.at.stage == len(self.stages) - 1:
                    break
                self.at.stage += 1
                self.at.stage_step, self.at.stage_seconds = 0, 0.0
        self.draw_all(is_final=True)

    def run_stage(self, save_seconds: float, sheet_seconds: float) -> Iterator[None]:
        """Train one stage to the end of its budget of counted seconds; yield at every step."""
        watch, recent = Stopwatch(), []
        saved = drawn = time.monotonic()
        while self.at.stage_seconds < self.budgets[self.at.stage]:
            started = time.monotonic()
            recent.append(self.step())
            now = time.monotonic()
            self.at.advance(watch.count(now - started), self.stage.batch)
            if len(recent) == STEPS_A_REPORT:
                self.report(statistics.fmean(recent), watch.typical)
                recent.clear()
            if now - saved > save_seconds:
                self.save()
                saved = now
            if now - drawn > sheet_seconds:
                self.draw_all(is_final=False)
                drawn = time.monotonic()
            yield
        self.save()

    def draw_all(self, is_final: bool) -> None:
        """Write the samples and the loss curve."""
        self.draw(is_final)
        draw_loss(self.at.losses, self.work / "loss.png")

    def report(self, loss: float, seconds: float) -> None:
        """Keep a point of the loss curve and log it."""
        self.at.losses.append((self.at.step, self.at.stage, loss))
        self.console.log(f"step {self.at.step}: loss {loss:.4f}, {seconds:.2f} s a step")


def parser(description: str, minutes: Sequence[float], work: str) -> argparse.ArgumentParser:
    """The options that every training script takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--minutes", type=float, nargs=len(minutes), default=list(minutes))
    result.add_argument("--work", type=Path, default=Path(work))
    result.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    result.add_argument("--save-seconds", type=float, default=120.0)
    result.add_argument("--sheet-seconds", type=float, default=420.0)
    return result


def train(training: Training, arguments: argparse.Namespace) -> None:
    """Run a training as its command line says."""
    if arguments.resume:
        training.load()
    training.run(arguments.save_seconds, arguments.sheet_seconds)
