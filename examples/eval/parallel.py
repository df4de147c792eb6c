"""Draw and compare the pictures of `specdiff eval` in several processes: for a large machine.

    python examples/eval/parallel.py --model emoji --device cuda --out eval
    specdiff eval --model emoji --out eval --measure time --measure flops

Pictures do not depend on what else runs; times do, so that they are left to `specdiff eval`, on
this machine or another: each phase of a result tells where it was measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from specdiff.evaluation.campaign import LATENTS, RESULTS
from specdiff.evaluation.candidates import all_candidates
from specdiff.evaluation.method import Candidate
from specdiff.models.subject import find_subject

WEIGHTS = Path("examples/training/textures/textures.safetensors")
COMMAND = (sys.executable, "-c", "from specdiff.cli.main import main; main()", "eval")


@dataclass(frozen=True)
class Wanted:
    """What every process is told."""

    model: str
    device: str
    out: Path
    sizes: Sequence[str]

    def start(
        self, folder: Path, phase: str, methods: Sequence[str], *more: str
    ) -> subprocess.Popen[bytes]:
        """One `specdiff eval` of these methods in a folder of its own, on one thread."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [part for name in methods for part in ("--method", name)]
        arguments = ["--model", self.model, "--weights", str(WEIGHTS)]
        arguments += ["--device", self.device, "--out", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with (folder / "log").open("wb") as log:
            return subprocess.Popen(
                [*COMMAND, *arguments, "--measure", phase, *self.sizes, *names, *more],
                stdout=log, stderr=log, env=environment,
            )  # fmt: skip


def parts(candidates: Sequence[Candidate], processes: int) -> list[list[str]]:
    """Methods a process: those of the large set one each, the others in shares of one size.

    Those of a family, next to each other, share what is compiled.
    """
    alone = [[one.name] for one in candidates if one.in_large_set]
    rest = [one.name for one in candidates if not one.in_large_set]
    size = -(-len(rest) // max(1, processes - len(alone)))
    return alone + [rest[start : start + size] for start in range(0, len(rest), size)]


def join(folders: Sequence[Path], out: Path, order: Sequence[str]) -> list[str]:
    """One folder of what lies in several, its methods in order; returns their names."""
    (out / LATENTS).mkdir(parents=True, exist_ok=True)
    joined: dict[str, Any] = {}
    for folder in folders:
        if not (folder / RESULTS).exists():
            print(folder, "drew nothing:", (folder / "log").read_text()[-2000:])
            continue
        found = json.loads((folder / RESULTS).read_text())
        methods = {**joined.get("methods", {}), **found["methods"]}
        joined = {**found, "methods": {name: methods[name] for name in order if name in methods}}
        for latents in (folder / LATENTS).glob("*"):
            shutil.move(latents, out / LATENTS / latents.name)
    (out / RESULTS).write_text(json.dumps(joined, indent=2) + "\n")
    return list(joined.get("methods", ()))


def main(
    model: Annotated[str, typer.Option(help="The trained model: emoji or textures.")] = "emoji",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("eval"),
    processes: Annotated[int, typer.Option(min=1, help="At a time.")] = 12,
    pictures: Annotated[int, typer.Option(min=1, help="Compared per method.")] = 32,
    pairs: Annotated[int | None, typer.Option(min=1, help="To be timed, later.")] = None,
    large_set: Annotated[int, typer.Option(min=0, help="For the distance between sets.")] = 256,
    minutes: Annotated[float, typer.Option(help="No method begins to draw after it.")] = 60.0,
    probe: Annotated[Path | None, typer.Option(help="Classifier of train_probe.py.")] = None,
) -> None:
    """Draw every method's pictures, then compare them."""
    if (out / RESULTS).exists():
        raise typer.BadParameter(
            f"{out / RESULTS} exists: choose another folder", param_hint="--out"
        )
    sizes = {"pictures": pictures, "pairs": pairs, "large-set": large_set, "probe": probe}
    given = [(f"--{name}", str(size)) for name, size in sizes.items() if size is not None]
    wanted = Wanted(model, device, out, [part for pair in given for part in pair])
    candidates = all_candidates(find_subject(model, WEIGHTS, torch.device(device)))
    shares = parts(candidates, processes)
    folders = [out / "parts" / str(number) for number in range(len(shares))]
    running = [
        wanted.start(folder, "draw", names, "--minutes", str(minutes))
        for folder, names in zip(folders, shares, strict=True)
    ]
    for process in running:
        process.wait()
    drawn = join(folders, out, [one.name for one in candidates])
    if not drawn:
        raise typer.Exit(1)
    failed = wanted.start(out, "compare", drawn).wait()
    print((out / "log").read_text()[-500:])
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
