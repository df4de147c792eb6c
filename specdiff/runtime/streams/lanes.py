"""Lanes: latents that take turns under the same conditions, as the tiles of a large picture do.

A *round* is what is called at one time. In every round the lanes have the same order.

    time   .9 .9 .9   .8 .8 .8   .7 ...
    lane    A  B  C    A  B  C    A ...

The order only says who is asked first. Who goes on is told by the latent.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdiff.runtime.streams.stream import Stream


def due(lanes: Sequence[Stream], time: float) -> list[Stream]:
    """Those that a call may belong to, the likeliest first.

    Args:
        lanes: of the call's conditions, in the order of their latest calls; at least one.
        time: of the call.
    """
    latest = lanes[-1].times
    in_round = [lane for lane in lanes if lane.times[-1] == latest[-1]]
    if time != latest[-1]:
        return in_round  # a new round, of those that were in the last one
    if len(latest) == 1:
        waiting = [lane for lane in lanes if lane.trail.turns_back(time)]  # a generation ago
    else:
        waiting = [lane for lane in lanes if lane.times[-1] == latest[-2]]
    waiting = [lane for lane in waiting if lane not in in_round]
    return [*waiting, *in_round]  # or a second call at the same time, as Heun's method makes
