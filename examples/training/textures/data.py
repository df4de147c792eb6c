"""Crops of the photographs that ship with scikit-image: real, busy, and nothing to download."""

import torch
from skimage import data
from torch import Tensor
from torch.nn.functional import interpolate

from specdiff.models.textures import CLASSES

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


class Crops:
    """Random crops of the photographs, mirrored where no letters show it."""

    def __init__(self) -> None:
        self.photographs = [photographs(name) for name in CLASSES]

    def draw(self, classes: Tensor, side: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a crop for each class index `[B]`: float32 `[B, 3, side, side]` in [-1, 1]."""
        return torch.stack([self._crop(index, side, generator) for index in classes.tolist()])

    def _crop(self, index: int, side: int, generator: torch.Generator | None) -> Tensor:
        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        choices = self.photographs[index]
        whole = choices[below(len(choices))]
        top, left = (below(size - side + 1) for size in whole.shape[1:])
        crop = whole[:, top : top + side, left : left + side]
        return crop.flip(-1) if CLASSES[index] != "page" and below(2) else crop
