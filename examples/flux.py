"""FLUX with specdiff: `python examples/flux.py FOLDER "a red apple"`, a folder as diffusers has it.

The picture is written to `flux.png`; then it is said what was computed of it.
"""

import sys

import torch
from diffusers import FluxPipeline

import specdiff


def main(folder: str, prompt: str, size: int = 1024, steps: int = 28, **options: object) -> None:
    """Draw a square picture; `options` are those of the backend, such as `quality="fast"`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.transformer.compile(backend="specdiff", options=options)
    image = pipe(prompt, height=size, width=size, num_inference_steps=steps).images[0]
    image.save("flux.png")
    print(specdiff.stats(pipe.transformer))


if __name__ == "__main__":
    main(*sys.argv[1:])
