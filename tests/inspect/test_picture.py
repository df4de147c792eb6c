"""The picture of a comparison, and what it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from specdiff.inspect import picture
from specdiff.measure.comparison import Comparison, compare
from tests.measure.standins import REQUESTS, SIDE, stand_ins


@pytest.fixture(name="comparison")
def _comparison() -> Comparison:
    return compare(stand_ins(), REQUESTS, repeats=2)


def test_picture_is_a_png_of_sane_size(comparison: Comparison, tmp_path: Path) -> None:
    file = tmp_path / "demo.png"
    picture.draw_comparison(comparison, file)
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        assert 1000 < opened.width < 4000
        assert 300 < opened.height < 2000


def test_difference_is_white_where_nothing_changed() -> None:
    reference = torch.full((SIDE, SIDE, 3), 0.5)
    changed = reference.clone()
    changed[0, 0] += 0.1
    shown = picture.difference(changed, reference)
    assert shown[0, 0, 0].item() == pytest.approx(1 - 0.1 * picture.AMPLIFICATION)
    assert (shown[1:] == 1).all()


def test_token_map_has_the_shape_of_the_picture() -> None:
    counts = torch.arange(32)
    assert picture.token_map(counts, 64, 128).shape == (4, 8)
    assert picture.token_map(counts.expand(3, 32), 128, 64).shape == (8, 4)
    with pytest.raises(ValueError, match="do not fill"):
        picture.token_map(torch.arange(7), 64, 128)
