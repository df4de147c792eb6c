"""Clean: where the sampler draws noise along a flow, the picture under it is forecast.

Fresh noise moves the velocity by an amount that is known, and hardly the clean picture
x0 = x - sigma v. So x0 is what is remembered and forecast, and v follows from the latent at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdiff.runtime.sampler.fresh import Fresh
from specdiff.runtime.step.call import Call
from specdiff.runtime.streams.stream import CleanPicture
from specdiff.runtime.tokens.clock import beyond
from specdiff.runtime.tokens.forecast import ahead

TIMED = "the sampler draws noise (leave out timesteps: what it draws is to be seen)"
ANEW = "the sampler draws all of its noise anew at each step"
NOTHING = "no picture under the noise was computed yet"
APART = "the sampler draws noise, and the model takes its samples apart"


def why_dense(call: Call) -> str:
    """Why nothing of a generation with noise is forecast; empty if it is, or there is none."""
    fresh = call.fresh
    if fresh is None:
        return ""
    if call.reading is None:
        return TIMED
    if fresh.anew:
        return ANEW
    if call.programs.signature.samples_apart:
        return APART
    return "" if call.stream.fit.clean else NOTHING


def cleaned(call: Call, found: Sequence[Any], *, computed: bool) -> Sequence[Any]:
    """The outputs of an evaluation, by the clean picture where the sampler draws noise.

    Args:
        call: the evaluation.
        found: its outputs, which are left as they are.
        computed: whether they were computed, in full.
    """
    fresh = call.fresh
    if fresh is None:
        return found
    if computed:
        _remember(call, found, fresh)
        return found
    own = [value.clone() if isinstance(value, Tensor) else value for value in found]
    _put_in(call, own, fresh)
    return own


def _remember(call: Call, outputs: Sequence[Any], fresh: Fresh) -> None:
    """Keep the clean picture under a latent whose velocity was computed."""
    signature, sigma = call.programs.signature, _sigma(call, fresh)
    pairs = zip(signature.moving_parts(call.inputs), signature.moved_by(outputs), strict=True)
    clean = tuple(latent.float() - sigma * velocity.float() for latent, velocity in pairs)
    call.stream.fit.clean = (CleanPicture(sigma, clean), *call.stream.fit.clean)[:2]


def _put_in(call: Call, outputs: Sequence[Any], fresh: Fresh) -> None:
    """Put the velocity towards the clean picture, as forecast, into the caller's own outputs."""
    signature, sigma = call.programs.signature, _sigma(call, fresh)
    newest, *older = call.stream.fit.clean
    clean = newest.parts
    if older:
        share = ahead(sigma, newest.sigma, older[0].sigma)
        clean = tuple(beyond(*pair, share) for pair in zip(clean, older[0].parts, strict=True))
    triples = zip(
        signature.moving_parts(call.inputs), clean, signature.moved_by(outputs), strict=True
    )
    for latent, picture, velocity in triples:
        velocity.copy_((latent.float() - picture) / sigma)


def _sigma(call: Call, fresh: Fresh) -> float:
    assert call.stream.run is not None  # it draws the noise
    return fresh.levels[call.stream.run.first + call.index]
