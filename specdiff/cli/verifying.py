"""`specdiff verify`: a gate before a pipeline goes live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli.common import console, make_folders, parse_options, write_figures
from specdiff.errors import SpecdiffError

if TYPE_CHECKING:
    from specdiff.evaluation.gate import Floors, Gate
    from specdiff.models.picture_model import Order, PictureModel


def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="demo; a folder with a diffusers pipeline, in safetensors; or file.py:function,"
            " which returns a pipeline, or a model and a dict of its inputs: then the oracles alone"
            " are asked."
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with a prompt on each line.")
    ] = None,
    floor: Annotated[
        float, typer.Option(help="Least PSNR of any picture against the dense one, in dB.")
    ] = 35,
    mean: Annotated[float | None, typer.Option(help="Least mean PSNR; none: --floor.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of one picture.")] = 28,
    size: Annotated[str | None, typer.Option(help="Of pictures, as 512x512.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; then counted up.")] = 0,
    quality: Annotated[str | None, typer.Option(help="The plan to hold to the floor.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other option, as name=value; repeatable.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the verdict goes, as JSON.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Hold a pipeline to the oracles, and its pictures to the dense ones; exit with 1 if it fails.

    Draws every prompt twice.
    """
    chosen = [] if quality is None else [f"quality={quality}"]
    options = parse_options([*chosen, *(option or [])])
    make_folders([json_file] if json_file is not None else [])
    from specdiff.evaluation.gate import Floors, judge_call, load_either
    from specdiff.measure.machine import usable_device
    from specdiff.models.picture_model import PictureModel
    from specdiff.models.subject import quiet_libraries

    quiet_libraries()
    subject = load_either(target, usable_device(device))
    if isinstance(subject, PictureModel):
        orders = _orders(subject, prompts, size, steps, seed)
        gate = _judge(subject, orders, options, Floors(floor, floor if mean is None else mean))
    elif prompts is not None:
        raise SpecdiffError(f"{target} returned a model, which draws no prompts: leave --prompts")
    else:
        gate = judge_call(subject, options)
    _show(gate)
    if json_file is not None:
        write_figures(json_file, gate.record())
    if gate.failures:
        raise typer.Exit(1)


def _orders(
    model: PictureModel, prompts: Path | None, size: str | None, steps: int, seed: int
) -> list[Order]:
    from specdiff.evaluation.gate import read_prompts
    from specdiff.models.picture_model import Order

    width, separator, height = (size or f"{model.side}x{model.side}").partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise SpecdiffError(f"--size: expected 512x512 or the like, got {size!r}")
    if prompts is None and not model.prompts:
        raise SpecdiffError("what should it draw? --prompts names a file, a prompt on each line")
    wanted: Sequence[str] = model.prompts[:4] if prompts is None else read_prompts(prompts)
    sides = (int(width), int(height))
    return [Order(prompt, *sides, steps, seed + i) for i, prompt in enumerate(wanted)]


def _judge(
    model: PictureModel, orders: Sequence[Order], options: Mapping[str, Any], floors: Floors
) -> Gate:
    """The verdict, behind a progress bar."""
    from specdiff.evaluation.gate import judge
    from specdiff.measure.progress import progress_bar

    total = 2 * len(orders) + 1
    with progress_bar(console, total) as update:
        update(completed=-1)  # the bar counts what is finished, and is told what begins
        gate = judge(
            model, orders, options, floors, lambda text: update(advance=1, description=text)
        )
        update(completed=total, description="done")
    return gate


def _show(gate: Gate) -> None:
    oracles = gate.verification
    lines = [f"oracles: largest error {oracles.max_error:.1e}", *oracles.reasons]
    lines += [f"{each.psnr:.1f} dB: {each.order.prompt}" for each in gate.pictures]
    if gate.pictures:
        lines.append(f"mean {gate.mean:.1f} dB, worst {gate.worst:.1f} dB; steps {gate.steps}")
    if gate.fallbacks:
        lines.append(f"dense by no plan: {gate.fallbacks}")
    verdict = [f"FAILED: {failure}" for failure in gate.failures] or ["passed"]
    console.print("\n".join([*lines, *verdict]), markup=False, highlight=False, soft_wrap=True)
