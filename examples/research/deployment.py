"""Deployment forms of the demo model: what each keeps of its own dense pictures, and how fast.

    python examples/research/deployment.py --out examples/research/deployment.md

Each form is drawn dense and accelerated from the same seeds. PSNR is between these two, so that
what quantising costs does not count. Emitted programs run eagerly: nothing waits for Inductor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deployment_forms as forms
import torch
from deployment_forms import Change, Form
from torch import Tensor

import specdiff
from specdiff.measure.comparison import psnr
from specdiff.models.subject import STEPS, Request, Subject, find_subject, quiet_libraries
from specdiff.runtime.records.stats import in_words

EAGER = {"inner_backend": "eager"}
PLANNED = len(specdiff.Options(quality="balanced").resolve().plan.dense)
PACKAGES = ("torch", "diffusers", "torchao", "gguf", "accelerate", "peft")
MOST_LOST = 0.5
"""dB that a form may lose on the plain model."""


def compiled(pipe: Any) -> None:
    """In place, as one graph."""
    pipe.transformer.compile(backend="specdiff", options=EAGER)


def selecting(pipe: Any) -> None:
    """In place, and a quarter of the tokens is computed where a plan would skip a step."""
    pipe.transformer.compile(backend="specdiff", options={**EAGER, "cache_ratio": 0.75})


def by_blocks(pipe: Any) -> None:
    """Each block, and attached."""
    pipe.transformer.compile_repeated_blocks(backend="specdiff", options=EAGER)
    specdiff.attach(pipe.transformer)


def attached(pipe: Any) -> None:
    """Nothing is compiled."""
    specdiff.attach(pipe.transformer)


def both(pipe: Any) -> None:
    """Compiled in place, and attached."""
    compiled(pipe)
    attached(pipe)


WAYS: dict[str, Change] = {
    "compiled": compiled,
    "compiled, cache_ratio=0.75": selecting,
    "compiled by blocks, attached": by_blocks,
    "attached": attached,
    "compiled, attached": both,
}


@dataclass(frozen=True)
class Drawn:
    """Pictures of one form."""

    pictures: list[Tensor]
    seconds: list[float]
    """Of CPU time."""
    model: Any


def draw(subject: Subject, pipe: Any, request: Request, form: Form) -> Tensor:
    """One picture."""
    latents: Tensor = pipe(
        **subject.arguments(request.prompt),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        callback_on_step_end=form.each_step,
    ).images
    return subject.to_pixels(latents)


def draw_all(subject: Subject, form: Form, requests: Sequence[Request], way: str = "") -> Drawn:
    """Pictures of a form, accelerated if a way is given: then one more is drawn, to compile."""
    torch.compiler.reset()
    pipe = subject.load()
    form.before(pipe)
    if way:
        WAYS[way](pipe)
    form.after(pipe)
    if way:
        draw(subject, pipe, requests[0], form)
    form.between(pipe)
    if way:
        specdiff.reset(pipe.transformer)
    drawn = Drawn([], [], pipe.transformer)
    for request in requests:
        start = time.process_time()
        drawn.pictures.append(draw(subject, pipe, request, form))
        drawn.seconds.append(time.process_time() - start)
        form.rest(pipe)
    return drawn


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    form: str
    way: str
    psnr: float
    dense: float
    speedup: float
    step_plan: str
    selection: str

    def __str__(self) -> str:
        cells = (
            self.form, self.way, f"{self.psnr:.1f}", f"{self.dense:g} of {STEPS}",
            f"{self.speedup:.2f}x", self.step_plan, self.selection,
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def measure(form: Form, requests: Sequence[Request], subject: Subject) -> list[Row]:
    """A line for each way to accelerate a form."""
    dense, rows = draw_all(subject, form, requests), []
    for way in form.ways:
        fast = draw_all(subject, form, requests, way)
        stats = specdiff.stats(fast.model)
        pairs = zip(fast.pictures, dense.pictures, strict=True)
        rows.append(
            Row(
                form.name,
                way,
                statistics.mean(psnr(each, exact) for each, exact in pairs),
                stats.dense / len(requests),
                sum(dense.seconds) / sum(fast.seconds),
                in_words(stats.no_step_plan),
                in_words(stats.no_selection),
            )
        )
    return rows


def page(rows: Sequence[Row], refused: Sequence[str], pictures: int) -> str:
    """The table in Markdown."""
    plain = {row.way: row.psnr for row in rows if row.form == "plain"}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    kept = [row for row in rows if row.step_plan == "yes"]
    good = [
        row
        for row in kept
        if row.psnr >= plain.get(row.way, rows[0].psnr) - MOST_LOST and row.dense <= PLANNED
    ]
    lines = [
        "# Deployment forms",
        "",
        f"The demo model, {pictures} picture(s) of {STEPS} steps, {torch.get_num_threads()} thread"
        f" of a CPU, {datetime.date.today()}; {', '.join(versions)}. Made by",
        "`python examples/research/deployment.py --out examples/research/deployment.md`.",
        "",
        "PSNR in dB, against the same form run dense. The plan has"
        f" {PLANNED} dense evaluations. Of {len(kept)} rows with a step plan {len(good)} have just"
        f" these, at most {MOST_LOST} dB below the plain model. Speedups are over the same form,"
        " uncompiled, in CPU time of the (first) process: the machine was shared.",
        "",
        "| form | accelerated by | PSNR | dense evaluations | speedup | step plan"
        " | token selection |",
        "|---|---|---|---|---|---|---|",
        *map(str, rows),
        "",
        *refused,
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--form", action="append", help="only these, by a part of their names")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    wanted = [
        form
        for form in forms.FORMS
        if not given.form or any(part in form.name for part in given.form)
    ]
    rows: list[Row] = []
    refused = []
    for form in wanted:
        try:
            found = forms.in_processes(form.processes, work, form, given.pictures)
        except Exception as error:
            why = str(error).strip().splitlines()[-1]  # of another process, all of its traceback
            refused.append(f"Not on this machine: {form.name} ({type(error).__name__}: {why}).")
            print(refused[-1], flush=True)
            continue
        rows += found
        print(*found, sep="\n", flush=True)
        if given.out:
            given.out.write_text(page(rows, refused, given.pictures), encoding="utf-8")


def work(form: Form, pictures: int) -> list[Row]:
    """What each process of a form does."""
    quiet_libraries()
    subject = find_subject("emoji", None, torch.device("cpu"))
    return measure(form, subject.requests(pictures, 0), subject)


if __name__ == "__main__":
    main()
