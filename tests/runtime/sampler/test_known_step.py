"""A step that is known beforehand, of a latent of which a part is held."""

import pytest
import torch

from specdiff.runtime.sampler.known_step import FOLLOWED, KnownStep, follows, lengths
from specdiff.runtime.sampler.remains import Seen

BF16 = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("noise", "goes"), [(0.0, True), (0.05, False)])
def test_only_what_moves_is_looked_at(noise: float, goes: bool) -> None:
    """The rounding of what is held, however large, hides no noise in the rest."""
    torch.manual_seed(0)
    before, prediction = torch.randn(1, 24, 8), torch.randn(1, 24, 8)
    before[:, :18] *= 20
    seen, known = Seen(0.5, (before,), ((prediction,),)), KnownStep(0, 1.0, -0.1)
    now = before - 0.1 * prediction + noise * torch.randn(1, 24, 8)
    now[:, :18] = before[:, :18]
    assert not follows(lengths([now], seen, known).tolist(), 0.0, FOLLOWED)
    assert follows(lengths([now], seen, known, moving=True).tolist(), BF16, FOLLOWED) is goes
