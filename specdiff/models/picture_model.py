"""Picture model: a pipeline that draws prompts, whoever asks: a server, or a gate before it.

model = load_picture_model("demo", torch.device("cpu"))
picture = model.draw(Order("red apple", 128, 128, steps=28, seed=0))  # [128, 128, 3] in 0..1
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdiff.errors import SpecdiffError
from specdiff.models import demo
from specdiff.models.named import function_named

DEMO = "demo"
PARTS = ("transformer", "unet")
"""Names under which pipelines hold their denoiser."""
NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
"""Arguments that a pipeline of pictures takes."""
STEPS = 28
MOST_STEPS = 200
SIDE, MOST_SIDE = 1024, 2048
"""Pixels a side of pictures by a pipeline: usually where it does not say, and at most."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class OrderError(SpecdiffError, ValueError):
    """A picture that cannot be drawn as asked for.

    Attributes:
        field: What is wrong with it: prompt, size or steps.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Order:
    """One picture that is asked for; sides in pixels."""

    prompt: str
    width: int
    height: int
    steps: int
    seed: int


@dataclass(frozen=True)
class PictureModel:
    """A pipeline, and how to ask it for a picture.

    Attributes:
        name: What clients call it.
        pipeline: One of diffusers, with a transformer or a UNet.
        arguments: The pipeline's arguments for a prompt and a width and height in pixels.
        picture: The picture `[H, W, 3]` in 0..1 of the pipeline's result.
        grid: Sides in pixels are multiples of it.
        sides: The least and the largest one.
        side: The usual one.
        square: Whether pictures are as wide as high.
        prompts: Some that may be tried.
        any_prompt: Whether others may be, too.
    """

    name: str
    pipeline: Any
    arguments: Callable[[str, int, int], Mapping[str, Any]]
    picture: Callable[[Any], Tensor]
    grid: int
    sides: tuple[int, int]
    side: int
    square: bool = False
    prompts: tuple[str, ...] = ()
    any_prompt: bool = True

    @property
    def part(self) -> str:
        """The name under which the pipeline holds its denoiser."""
        return next(part for part in PARTS if getattr(self.pipeline, part, None) is not None)

    @property
    def denoiser(self) -> nn.Module:
        """The model that is called at every step."""
        module: nn.Module = getattr(self.pipeline, self.part)
        return module

    def check(self, order: Order) -> None:
        """Say what is wrong with an order before anything runs.

        Raises:
            OrderError: A size, a number of steps or a prompt that the model does not draw.
        """
        low, high = self.sides
        for side in (order.width, order.height):
            if side % self.grid or not low <= side <= high:
                sizes = f"multiples of {self.grid} from {low} to {high}"
                raise OrderError("size", f"sides must be {sizes}, not {side}")
        if self.square and order.width != order.height:
            raise OrderError("size", "this model draws squares only")
        if not 1 <= order.steps <= MOST_STEPS:
            raise OrderError("steps", f"must be from 1 to {MOST_STEPS}, not {order.steps}")
        if not order.prompt.strip():
            raise OrderError("prompt", "is empty")
        if not self.any_prompt and order.prompt not in self.prompts:
            raise OrderError(
                "prompt",
                "this model knows a few by heart; others need its text encoder, pip install"
                f' "specdiff[text]". Known are: {", ".join(self.prompts)}',
            )

    def beside(self, denoiser: nn.Module) -> Any:
        """The pipeline with a scheduler of its own, around another denoiser; weights are shared."""
        mine = copy.copy(self.pipeline)
        mine.scheduler = type(mine.scheduler).from_config(mine.scheduler.config)
        setattr(mine, self.part, denoiser)
        mine.set_progress_bar_config(disable=True)
        return mine

    def draw(self, order: Order, pipeline: Any = None) -> Tensor:
        """The picture `[H, W, 3]` in 0..1, float32 on the CPU, by this pipeline or `pipeline`."""
        run = self.beside(self.denoiser) if pipeline is None else pipeline
        result = run(
            **self.arguments(order.prompt, order.width, order.height),
            num_inference_steps=order.steps,
            generator=torch.Generator("cpu").manual_seed(order.seed),
        )
        return self.picture(result).float().cpu()


def load_picture_model(target: str, device: torch.device) -> PictureModel:
    """The model that a command names.

    Args:
        target: `demo`; a folder that a pipeline of diffusers was saved in, of which only
            safetensors are read; or `file.py:function`, which returns a pipeline.
        device: Where the model is put; a function chooses its own.

    Raises:
        SpecdiffError: There is nothing of that name, or it draws no pictures of prompts.
    """
    if target == DEMO:
        return demo_model(device)
    if Path(target).is_dir():
        return of_pipeline(load_folder(Path(target), device), Path(target).resolve().name)
    if ":" not in target:
        raise SpecdiffError(
            f"{target!r}: expected demo, the folder of a diffusers pipeline, or file.py:function"
        )
    return of_pipeline(function_named(target)(), target.rpartition(":")[2])


def demo_model(device: torch.device) -> PictureModel:
    """The model that ships with the package."""
    any_prompt = demo.has_text_encoder()

    def arguments(prompt: str, width: int, height: int) -> Mapping[str, Any]:
        tokens, pooled = demo.prompt_embeddings([prompt])
        return {
            "prompt_embeds": tokens.to(device),
            "pooled_prompt_embeds": pooled.to(device),
            "width": width * demo.PIPELINE_SIDE // demo.SIDE,
            "height": height * demo.PIPELINE_SIDE // demo.SIDE,
            "output_type": "latent",
        }

    return PictureModel(
        "specdiff-demo",
        demo.load_pipeline(device),
        arguments,
        lambda result: demo.to_pixels(result.images)[0].permute(1, 2, 0),
        grid=16,
        sides=(32, 256),
        side=demo.SIDE,
        square=True,
        prompts=tuple(demo.stored_prompts()),
        any_prompt=any_prompt,
    )


def load_folder(folder: Path, device: torch.device) -> Any:
    """A pipeline as diffusers saved it: in bfloat16 on an accelerator, in float32 on a CPU.

    Raises:
        SpecdiffError: Weights that are pickles, or no pipeline that diffusers knows.
    """
    from diffusers import DiffusionPipeline

    pickles = sorted(file for kind in PICKLES for file in folder.rglob(kind))
    unsafe = [file for file in pickles if not list(file.parent.glob("*.safetensors"))]
    if unsafe:
        raise SpecdiffError(
            f"{unsafe[0]} is a pickle, which may run code: save the pipeline with"
            " save_pretrained(folder, safe_serialization=True)"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, AttributeError, ImportError, KeyError) as error:
        raise SpecdiffError(f"{folder}: diffusers reads no pipeline there: {error}") from error
    return pipeline.to(device)


def of_pipeline(pipeline: Any, name: str) -> PictureModel:
    """A pipeline that turns a prompt into a picture.

    Raises:
        SpecdiffError: It does not, or holds its denoiser under no usual name.
    """
    taken = inspect.signature(type(pipeline).__call__).parameters
    missing = [argument for argument in NEEDED if argument not in taken]
    if missing or not hasattr(pipeline, "scheduler"):
        lack = missing[0] if missing else "scheduler"
        raise SpecdiffError(f"a {type(pipeline).__name__} is no pipeline of pictures: no {lack}")
    if all(getattr(pipeline, part, None) is None for part in PARTS):
        raise SpecdiffError(f"{type(pipeline).__name__} has no {' and no '.join(PARTS)}")
    scale = getattr(pipeline, "vae_scale_factor", 8)
    usual = getattr(pipeline, "default_sample_size", None)

    def arguments(prompt: str, width: int, height: int) -> Mapping[str, Any]:
        sides = {"width": width, "height": height}
        given = {side: pixels for side, pixels in sides.items() if side in taken}
        return {"prompt": prompt, "output_type": "pt", **given}

    return PictureModel(
        name,
        pipeline,
        arguments,
        lambda result: result.images[0].permute(1, 2, 0),
        grid=2 * scale,
        sides=(2 * scale, MOST_SIDE),
        side=min(usual * scale, MOST_SIDE) if isinstance(usual, int) else SIDE,
    )
