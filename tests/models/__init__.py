"""Small random diffusion transformers, and inputs for them."""

from tests.models import audio, image, image_more, video, video_more
from tests.models.case import Builder, Case, Inputs, builders, randomize
from tests.models.small import MODELS, changed, flux, sd3

ZOO: dict[str, Builder] = {
    **image.MODELS,
    **image_more.MODELS,
    **video.MODELS,
    **video_more.MODELS,
    **audio.MODELS,
}
"""Every denoising transformer of diffusers, one small configuration or more of each."""

__all__ = [
    "MODELS",
    "ZOO",
    "Builder",
    "Case",
    "Inputs",
    "builders",
    "changed",
    "flux",
    "randomize",
    "sd3",
]
