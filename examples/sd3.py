"""Stable Diffusion 3 with specdiff: `python examples/sd3.py FOLDER "a red apple"`.

Guidance puts two halves into one batch: specdiff is told its scale. Writes `sd3.png`.
"""

import sys

import torch
from diffusers import StableDiffusion3Pipeline

import specdiff

SCALE = 7.0


def main(folder: str, prompt: str, size: int = 1024, steps: int = 28, **options: object) -> None:
    """Draw a square picture; `options` are those of the backend, such as `quality="fast"`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.transformer.compile(backend="specdiff", options={"guidance_scale": SCALE, **options})
    sizes = {"height": size, "width": size, "num_inference_steps": steps}
    image = pipe(prompt, guidance_scale=SCALE, **sizes).images[0]
    image.save("sd3.png")
    print(specdiff.stats(pipe.transformer))


if __name__ == "__main__":
    main(*sys.argv[1:])
