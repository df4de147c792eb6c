"""A third small trained model, harder to skip steps of: crops of photographs, strongly guided.

Trained by `examples/training/train_photos.py`; architecture, sizes and pipeline are those of
`specdiff.models.textures`. The weights do not ship with the package: they lie in a clone's
`examples/training/photos`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdiff.models.textures import codes_of

CLASSES = ("stream", "peaks", "hillside", "brushes", "fig", "dandelions", "cat", "coffee")
GUIDANCE_SCALE = 6.0


def class_codes(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The fixed random code of each class, as `specdiff.models.textures.class_codes` has them."""
    return codes_of(names, CLASSES, seed=1)
