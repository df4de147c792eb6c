"""The demo model in the real ComfyUI, dense and with specdiff's node, by sampler and scheduler.

    git clone https://github.com/Comfy-Org/ComfyUI
    pip install torchsde einops scipy psutil aiohttp yarl pyyaml pydantic-settings
    pip install comfy-kitchen comfy-aimdo simpleeval blake3 alembic sqlalchemy
    python examples/serving/comfyui.py ComfyUI --markdown examples/serving/comfyui.md

Each line of the table: a sampler's own dense pictures against those with a plan, and against fewer
steps at as many evaluations (the least number of steps that takes no fewer). ComfyUI is run, never
copied; what only other models need of torchvision and torchaudio is replaced by stand-ins.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.abc
import importlib.machinery
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from specdiff.integrations.comfyui.patch import patched
from specdiff.models import demo
from specdiff.models.subject import TUNED_ON
from specdiff.plan import Plan

PROMPTS = tuple(demo.stored_prompts()[TUNED_ON : TUNED_ON + 4])
"""Nothing was tuned on these."""
ABSENT = ("torchvision", "torchaudio", "av")
"""What only other models and nodes need, stood in for where it is not installed."""
SHAPE = (1, 12, 64, 64)
PLANS = {
    20: Plan.of(20, (0, 2, 4, 7, 11, 15, 19)),
    28: Plan.of(28, (0, 2, 4, 7, 10, 14, 18, 22, 26, 27)),
}
"""About 2.8x, which is one evaluation of 28 less than "balanced"."""
FLUX: dict[str, Any] = {
    "image_model": "flux", "in_channels": 12, "out_channels": 12, "vec_in_dim": 384,
    "context_in_dim": 384, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2,
    "depth_single_blocks": 4, "axes_dim": [8, 28, 28], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
"""The demo model's sizes, as ComfyUI names them."""


class Said(logging.Handler):
    """The last line that the node logged."""

    line = ""

    def __init__(self) -> None:
        super().__init__()
        log = logging.getLogger("specdiff.integrations.comfyui")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.line = record.getMessage()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for every part of a package that is absent."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """That of a package, so that its parts are looked for, too."""
        known = name.partition(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        """Anything that is asked of it."""
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        """Nothing is run."""


def start(checkout: Path) -> None:
    """Make ComfyUI of a checkout importable, on the CPU, with stand-ins for what is absent."""
    demo.load_pipeline()  # diffusers is imported before the stand-ins
    sys.meta_path.append(StandIns())
    sys.path.insert(0, str(checkout))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments


class ComfyUI:
    """ComfyUI from a checkout, with the demo model in its own FLUX code."""

    def __init__(self, checkout: Path) -> None:
        start(checkout)
        import comfy.model_patcher
        import comfy.sample
        import comfy.samplers
        import comfyui_version

        self.version = comfyui_version.__version__
        self.samplers: list[str] = comfy.samplers.KSampler.SAMPLERS
        self.schedulers: list[str] = comfy.samplers.KSampler.SCHEDULERS
        self.evaluations = 0
        self.net = _model()
        self.net.diffusion_model.final_layer.register_forward_hook(self._count)
        self._sample = comfy.sample
        cpu = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.net, load_device=cpu, offload_device=cpu
        )

    def _count(self, *_: object) -> None:
        self.evaluations += 1

    def draw(
        self, model: Any, prompt: str, steps: int, sampler: str, scheduler: str, cfg: float
    ) -> Tensor:
        """A latent; `evaluations` counts on."""
        latent = torch.zeros(SHAPE)
        noise = self._sample.prepare_noise(latent, 0)
        positive, negative = _conditions(prompt), _conditions("cactus")
        return self._sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip


def _model() -> Any:
    """ComfyUI's FLUX with the weights of the demo model."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils

    config = comfy.supported_models.FluxSchnell(FLUX)
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = SHAPE[1]
    config.sampling_settings = {"shift": 3.0, "multiplier": 1.0}
    config.unet_config["dtype"] = torch.float32
    net = comfy.model_base.Flux(config, model_type=comfy.model_base.ModelType.FLOW).eval()
    mine, theirs = net.diffusion_model.state_dict(), demo.load_transformer().state_dict()
    for name, place in comfy.utils.flux_to_diffusers(FLUX).items():
        value = theirs.get(name)
        if value is None:
            continue
        if isinstance(place, str):
            mine[place].copy_(value)
            continue
        target, span, *change = place
        value = change[0](value) if change else value
        (mine[target] if span is None else mine[target].narrow(*span)).copy_(value)
    return net


def _conditions(prompt: str) -> list[Any]:
    tokens, pooled = demo.prompt_embeddings([prompt])
    return [[tokens, {"pooled_output": pooled}]]


def psnr(drawn: Sequence[Tensor], dense: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over pictures, and lowest, dB."""
    each = [*map(_psnr, drawn, dense)]
    return sum(each) / len(each), min(each)


def _psnr(drawn: Tensor, dense: Tensor) -> float:
    if not drawn.isfinite().all():
        return float("nan")
    error = (_picture(drawn) - _picture(dense)).square().mean().item()
    return -10 * torch.tensor(error).log10().item() if error else 99.0


def _picture(latent: Tensor) -> Tensor:
    return (latent.double().clamp(-1, 1) + 1) / 2


def rows(
    comfy: ComfyUI,
    said: Said,
    cases: Sequence[tuple[str, str]],
    steps: int,
    cfg: float,
    prompts: Sequence[str],
    keep: Path | None,
) -> Iterator[str]:
    """A line of the table for each sampler and scheduler."""
    for sampler, scheduler in cases:
        how = (sampler, scheduler, cfg)

        def draw(count: int, model: Any, how: Any = how) -> tuple[list[Tensor], float]:
            comfy.evaluations = 0
            drawn = [comfy.draw(model, prompt, count, *how) for prompt in prompts]
            return drawn, comfy.evaluations / len(prompts)

        def alone(count: int, draw: Any = draw, how: Any = how) -> tuple[list[Tensor], float]:
            return _kept(keep, (*how, count, *prompts), lambda: draw(count, comfy.patcher))

        try:
            dense, all_evaluations = alone(steps)
            made, computed = draw(steps, patched(comfy.patcher, plan=PLANS[steps]))
            line = said.line
            fewer, few = dense, all_evaluations
            for count in _counts(steps, computed, all_evaluations) if computed < few else ():
                fewer, few = alone(count)
                if few >= computed:
                    break
        except Exception as error:
            yield f"| {sampler} | {scheduler} | fails dense, too: {type(error).__name__} {error} |"
            continue
        (ours, worst), (theirs, their_worst) = psnr(made, dense), psnr(fewer, dense)
        yield (
            f"| {sampler} | {scheduler} | {all_evaluations:.0f} | {computed:.0f}"
            f" | {all_evaluations / computed:.2f} | {ours:.1f}, {worst:.1f}"
            f" | {theirs:.1f}, {their_worst:.1f} ({few:.0f})"
            f" | {ours - theirs:+.1f} | {line.partition('Computed: ')[2]} |"
        )


def _kept(folder: Path | None, of: Sequence[Any], draw: Any) -> Any:
    """What `draw` gives, from the folder if it is there from an earlier run."""
    file = folder / ("-".join(map(str, of)).replace(" ", "_") + ".pt") if folder else None
    if file is not None and file.exists():
        return torch.load(file)
    drawn = draw()
    if file is not None:
        torch.save(drawn, file)
    return drawn


def _counts(steps: int, computed: float, evaluations: float) -> range:
    """Numbers of steps to try, from the least that may take as many evaluations."""
    return range(max(2, math.ceil(steps * computed / evaluations)), steps + 1)


HEAD = (
    "| sampler | scheduler | evaluations | computed | fewer, x | PSNR, dB"
    " | fewer steps, dB (evaluations) | ahead, dB | why computed |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28], choices=list(PLANS))
    parser.add_argument("--samplers", nargs="+", help="default: all")
    parser.add_argument("--schedulers", nargs="+", default=["simple"], help="or all")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--keep", type=Path, help="folder of pictures without a plan, drawn once")
    parser.add_argument("--markdown", type=Path, help="file that the tables go on top of")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    comfy, said = ComfyUI(given.checkout), Said()
    samplers = given.samplers or comfy.samplers
    schedulers = comfy.schedulers if given.schedulers == ["all"] else given.schedulers
    for steps in given.steps:
        title = (
            f"\n## {steps} steps, guidance {given.cfg:g}\n\nComfyUI {comfy.version}, torch"
            f" {torch.__version__}, {datetime.date.today()}; prompts {', '.join(given.prompts)}.\n"
        )
        cases = [(sampler, scheduler) for sampler in samplers for scheduler in schedulers]
        for line in (title, HEAD):
            _write(line, given.markdown)
        for line in rows(comfy, said, cases, steps, given.cfg, given.prompts, given.keep):
            _write(line, given.markdown)


def _write(line: str, file: Path | None) -> None:
    print(line, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
