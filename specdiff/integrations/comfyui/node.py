"""The node, in the form that ComfyUI takes at present (V3): model and quality in, model out."""

from __future__ import annotations

from typing import Any

from specdiff.integrations.comfyui.patch import patched
from specdiff.settings import OFF, QUALITIES

CHOICES = ("balanced", *(name for name in QUALITIES if name != "balanced"), OFF)


def options_of(quality: str, plan: str) -> dict[str, Any]:
    """What the widgets stand for: the path of a plan outranks the quality."""
    return {"plan": plan.strip()} if plan.strip() else {"quality": quality}


def extension() -> Any:
    """The extension that ComfyUI loads."""
    from comfy_api.latest import ComfyExtension, io

    class Specdiff(io.ComfyNode):  # type: ignore[misc]
        """Computes some of the sampler's steps and forecasts the others."""

        @classmethod
        def define_schema(cls) -> Any:
            """Inputs and outputs."""
            return io.Schema(
                node_id="Specdiff",
                display_name="specdiff",
                category="model_patches",
                description="Computes the steps that matter and forecasts the others.",
                inputs=[
                    io.Model.Input("model"),
                    io.Combo.Input(
                        "quality",
                        options=list(CHOICES),
                        default=CHOICES[0],
                        tooltip="From closest (slowest) to fast; dense computes every step.",
                    ),
                    io.String.Input(
                        "plan",
                        default="",
                        optional=True,
                        tooltip="Path of a plan by `specdiff tune`; empty: the quality's own.",
                    ),
                ],
                outputs=[io.Model.Output()],
            )

        @classmethod
        def execute(cls, model: Any, quality: str, plan: str = "") -> Any:
            """A clone of the model with the plan."""
            return io.NodeOutput(patched(model, **options_of(quality, plan)))

    class Extension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[Any]:
            return [Specdiff]

    return Extension()
