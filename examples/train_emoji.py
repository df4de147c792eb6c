"""Train a small text-to-image rectified flow in the FLUX architecture on Fluent emoji.

The model works on pixels: a token is a 4x4 patch. The first stage learns from small pictures,
their positions spread over the range of the large ones; the second from large pictures of which
each step sees a quarter of the tokens; the last from whole ones. Run it on a CPU or a GPU:

    python examples/train_emoji.py --minutes 15 50 30 --work /tmp/emoji
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from emoji.data import EmojiData, prepare
from emoji.model import MODEL, build_model, build_optimizers
from emoji.pictures import draw_loss, draw_sheet, position_ids, sample
from emoji.prompts import HELD_OUT_PROMPTS, TRAINED_PROMPTS
from emoji.stages import STAGES, Progressed, Stage, Stopwatch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor

from specdiff.demo import TEXT_TOKENS, TIME_SHIFT, pack

CAPTION_SHARES = (0.45, 0.35, 0.2)
CAPTION_DROPOUT = 0.1
WARM_UP_STEPS = 10
DECAY_SHARE = 0.7
"""Share of the last stage over which the learning rate falls to zero."""
STEPS_A_REPORT = 25
QUICK_PROMPTS, QUICK_STEPS = 16, 14
"""Size of the sample sheets on the way; the last one is complete."""


class Trainer:
    """Model, averages, optimizers and data of one run, with checkpoints in `work`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.budgets = [60.0 * minutes for minutes in arguments.minutes]
        self.guidance: list[float] = arguments.guidance
        self.work: Path = arguments.work
        self.data: EmojiData = prepare(arguments.cache)
        self.model = build_model().to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.optimizers = build_optimizers(self.model)
        self.at = Progressed()
        self.console = Console()

    @property
    def stage(self) -> Stage:
        """The stage under way."""
        return STAGES[self.at.stage]

    def kept_tokens(self) -> Tensor:
        """Draw which tokens a step sees, in turn a window or one token from each small block.

        Windows teach how neighbours fit together, the others how the whole picture looks.
        """
        side, kept = self.stage.token_side, self.stage.kept_side
        grid = torch.arange(side * side).view(side, side)
        if self.at.step % 2:
            top, left = torch.randint(side - kept + 1, (2,)).tolist()
            return grid[top : top + kept, left : left + kept].flatten()
        block = side // kept
        inside = torch.randint(block, (2, kept, kept))
        start = torch.arange(kept) * block
        return grid[start[:, None] + inside[0], start[None, :] + inside[1]].flatten()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw packed pictures in [-1, 1], token states and pooled states."""
        data, size = self.data, self.stage.batch
        index = data.train[torch.randint(len(data.train), (size,))]
        caption = torch.multinomial(torch.tensor(CAPTION_SHARES), size, replacement=True)
        keep = (torch.rand(size) >= CAPTION_DROPOUT).float()
        pictures = data.pictures[self.stage.side][index].float() / 127.5 - 1
        tokens = data.tokens[index, caption] * keep[:, None, None]
        pooled = data.pooled[index, caption] * keep[:, None]
        return pack(pictures).to(self.device), tokens.to(self.device), pooled.to(self.device)

    def velocity(
        self,
        network: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        text: list[Tensor],
        ids: Tensor,
    ) -> Tensor:
        """Run the network in bfloat16 and return the velocity in float32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return network(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=text[0],
                pooled_projections=text[1],
                txt_ids=torch.zeros(TEXT_TOKENS, 3, device=self.device),
                img_ids=ids,
                return_dict=False,
            )[0].float()

    def loss(self) -> Tensor:
        """Return the flow-matching loss on a fresh batch.

        With guidance g in [0, 1) the target moves away from the model's own unconditional answer,
        so that plain sampling behaves like classifier-free guidance of scale 1 / (1 - g)
        ("model guidance", arXiv 2502.12154).
        """
        data, *text = self.batch()
        kept = self.kept_tokens().to(self.device)
        data, ids = data[:, kept], position_ids(self.stage.token_side).to(self.device)[kept]
        # the times that sampling visits: a picture's colours are decided in heavy noise
        t = torch.rand(len(data), device=self.device)
        t = TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)
        noise = torch.randn_like(data)
        x = torch.lerp(data, noise, t[:, None, None])
        velocity, target = self.velocity(self.compiled, x, t, text, ids), noise - data
        if guidance := self.guidance[self.at.stage]:
            with torch.no_grad():
                nothing = [torch.zeros_like(states) for states in text]
                # not compiled: that would take longer than it saves in a short stage
                plain = self.velocity(self.model, x, t, nothing, ids)
            target = target + guidance * (velocity.detach() - plain)
        return (velocity - target).square().mean()

    def rate_scale(self) -> float:
        """Warm up at each stage, stay constant, fall to zero at the end of the last."""
        scale = min(1.0, (self.at.stage_step + 1) / WARM_UP_STEPS)
        if self.at.stage == len(STAGES) - 1:
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
        }
        torch.save(state, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")
        weights = {k: v.half().contiguous() for k, v in self.average.state_dict().items()}
        save_file(weights, self.work / "emoji.tmp", metadata={"config": json.dumps(MODEL)})
        (self.work / "emoji.tmp").replace(self.work / "emoji.safetensors")
        (self.work / "loss.json").write_text(json.dumps(asdict(self.at)))

    def load(self) -> None:
        """Continue from the checkpoint in the work folder."""
        state = torch.load(self.work / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.at = Progressed(**state["at"])

    def draw(self, prompts: int | None = None, steps: int = 28) -> None:
        """Write a sample sheet of the averaged weights and the loss curve."""
        chosen = [*TRAINED_PROMPTS, *HELD_OUT_PROMPTS][:prompts]
        pictures = sample(self.average, self.data, chosen, self.stage.token_side, steps)
        draw_sheet(pictures, self.work / f"sheet-{self.at.stage}-{self.at.step:06d}.png")
        draw_loss(self.at.losses, self.work / "loss.png")

    def run(self, save_seconds: float, sheet_seconds: float) -> None:
        """Train through all the stages that are left."""
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("training", total=sum(self.budgets))
            while True:
                for _ in self.run_stage(save_seconds, sheet_seconds):
                    done = sum(self.budgets[: self.at.stage]) + self.at.stage_seconds
                    progress.update(task, completed=done, description=f"stage {self.at.stage + 1}")
                if self.at.stage == len(STAGES) - 1:
                    break
                self.at.stage += 1
                self.at.stage_step, self.at.stage_seconds = 0, 0.0
        self.draw()

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
                self.draw(QUICK_PROMPTS, QUICK_STEPS)
                drawn = time.monotonic()
            yield
        self.save()

    def report(self, loss: float, seconds: float) -> None:
        """Keep a point of the loss curve and log it."""
        self.at.losses.append((self.at.step, self.at.stage, loss))
        self.console.log(f"step {self.at.step}: loss {loss:.4f}, {seconds:.2f} s a step")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs=len(STAGES), default=[15.0, 50.0, 30.0])
    parser.add_argument("--guidance", type=float, nargs=len(STAGES), default=[0.0, 0.0, 0.5])
    parser.add_argument("--work", type=Path, default=Path("emoji-run"))
    parser.add_argument("--cache", type=Path, default=Path("emoji-cache"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--save-seconds", type=float, default=120.0)
    parser.add_argument("--sheet-seconds", type=float, default=420.0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    if arguments.resume:
        trainer.load()
    trainer.run(arguments.save_seconds, arguments.sheet_seconds)


if __name__ == "__main__":
    main()
