"""ComfyUI: a node that gives a model's sampling a plan.

    python -m specdiff.integrations.comfyui path/to/ComfyUI      installs it

    node.py     the node: model and quality in, model out
    patch.py    what hangs on the cloned model patcher
    run.py      one run of a sampler: which evaluations are computed, and why
    lane.py     forecasts of one list of conditions
    steps.py    what the sampler makes of the answers
    watch.py    whether it went where they lead

ComfyUI itself is imported when it asks for the node, never before.
"""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to learn of the nodes."""
    from specdiff.integrations.comfyui.node import extension

    return extension()
