"""`specdiff eval` and `specdiff tune`: what they take; the work is in `specdiff.evaluation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdiff.cli.common import console, make_folders, parse_options, require_compiler
from specdiff.errors import SpecdiffError

Model = Annotated[str, typer.Option(help="The trained model: emoji, textures, photos or motion.")]
Weights = Annotated[
    Path | None, typer.Option(help="Of any but emoji, which alone has its own in the package.")
]


def evaluate_methods(
    model: Model = "emoji",
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder for results, table and plot.")] = Path("eval"),
    quick: Annotated[
        bool, typer.Option("--quick", help="4 pictures, 2 of them timed, no large set.")
    ] = False,
    pictures: Annotated[int | None, typer.Option(min=1, help="Compared per method (32).")] = None,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Of them timed, in turn with dense (8, or as many as there are)."),
    ] = None,
    large_set: Annotated[
        int | None, typer.Option(min=0, help="For the distance between sets (256); 0: not.")
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="Classifier of examples/training/train_probe.py.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; then counted up.")] = 100,
    method: Annotated[
        list[str] | None, typer.Option(help="Only methods of this name or pattern; repeatable.")
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="Also specdiff by a plan in a file; repeatable.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Only draw, compare, solution, time, flops; repeatable."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin nothing after this; run again for the rest.")
    ] = None,
    clock: Annotated[
        str, typer.Option(help="wall; or cpu, for ratios on a machine that others keep busy.")
    ] = "wall",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Measure specdiff, fewer steps and the caches of diffusers and cache-dit, on equal terms.

    Writes results.json, table.md and frontier.png; run again, it goes on where it stopped and tries
    again what refused to run.
    """
    require_compiler()
    make_folders([out / "results.json"])
    from specdiff.evaluation.command import AMOUNTS, Amounts, Wanted, evaluate
    from specdiff.models.subject import quiet_libraries

    quiet_libraries()
    usual = AMOUNTS["quick" if quick else "full"]
    compared = pictures or usual.pictures
    sizes = Amounts(
        compared,
        pairs or min(usual.pairs, compared),
        usual.large_set if large_set is None else large_set,
    )
    wanted = Wanted(
        model, weights, device, sizes, seed, probe, out,
        method or (), plan or (), measure or (), minutes, clock,
    )  # fmt: skip
    left = evaluate(wanted, console)
    console.print(f"{out}: " + (f"{left} measurements left: run again" if left else "complete"))


def tune_plan(
    model: Model = "emoji",
    weights: Weights = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="What to keep: 40 dB, or a feature distance of 0.15; with --solution what the"
            " dense pictures have."
        ),
    ] = None,
    solution: Annotated[
        bool,
        typer.Option(help='Tune for target="solution": closeness to where very many steps lead.'),
    ] = False,
    measure: Annotated[str, typer.Option(help="psnr, or features.")] = "psnr",
    prompts: Annotated[int, typer.Option(min=1, help="Pictures to tune on.")] = 3,
    held_back: Annotated[int, typer.Option(min=0, help="More, to check the result on.")] = 3,
    budget: Annotated[
        int, typer.Option(min=1, help="Evaluations of the model to spend, the check beside.")
    ] = 1500,
    steps: Annotated[int, typer.Option(min=3, help="Denoising steps of one picture.")] = 28,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the backend, as name=value; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Find the fastest plan that keeps pictures this close to the dense ones, and save it.

    Says how close its pictures come to the dense ones, and with --solution to the solution of the
    sampling equation, in the mean and the worst tenth.

    Tunes on seeds that `specdiff eval` does not use, and on emoji on other prompts, too; textures
    and photos have the same classes for both. For a pipeline of your own, see specdiff.tune.
    """
    options = parse_options(option or [])
    require_compiler()
    make_folders([out])
    from specdiff.evaluation.tuning import Tuning, tune_subject
    from specdiff.models.subject import quiet_libraries

    quiet_libraries()
    wanted = Tuning(
        model, weights, device, measure, target, prompts, held_back, budget, steps, options,
        solution,
    )  # fmt: skip
    tuned = tune_subject(wanted, console)
    skips = len(tuned.plan.ratios) - len(tuned.plan.dense)
    if not skips:
        raise SpecdiffError(
            f"target not reached within the budget, {tuned.spent} evaluations spent: no plan saved;"
            " ask for less, or give a larger --budget"
        )
    tuned.plan.save(out)
    console.print(f"dense: {tuned.plan.dense}, {skips} skipped", highlight=False)
    for name, value in tuned.plan.notes.items():
        console.print(f"{name}: {_note(value)}", highlight=False)
    console.print(f"plan: {out}", highlight=False)


def _note(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {number}" for name, number in value.items())
