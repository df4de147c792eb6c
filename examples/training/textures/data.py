"""The photographs that ship with scikit-image: real, busy, and nothing to download."""

import torch
from skimage import data
from torch import Tensor
from torch.nn.functional import interpolate

SOURCES = {
    "brick": (data.brick,),
    "grass": (data.grass,),
    "gravel": (data.gravel,),
    "coins": (data.coins,),
    "page": (data.page, data.text),
    "galaxies": (data.hubble_deep_field,),
    "tissue": (data.immunohistochemistry,),
    "workshop": (lambda: data.stereo_motorcycle()[0],),
}
SCALES = (0.5, 0.7, 1.0)


def _photograph(array: object) -> Tensor:
    """Return a photograph as float32 `[3, H, W]` in [-1, 1]."""
    picture = torch.as_tensor(array).float() / 127.5 - 1
    return picture.movedim(-1, 0)[:3] if picture.dim() == 3 else picture.expand(3, -1, -1)


def photographs(name: str) -> list[Tensor]:
    """Return every photograph of a class at every scale."""
    originals = [_photograph(load()) for load in SOURCES[name]]
    return [
        interpolate(one[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
        for one in originals
        for scale in SCALES
    ]
