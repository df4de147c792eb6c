"""Models of the real ComfyUI, small and with random weights, under specdiff's node.

    python examples/serving/comfyui_models.py ComfyUI --markdown examples/serving/comfyui_models.md

Needs what comfyui.py needs. The weights say nothing of quality, so that this asks what holds for
any weights: where every step is computed, the latent is that without the node, to the bit; with a
plan, the model is called for the steps of the plan and no others; conditions in one batch and one
by one give the same latent; each run says what it did, and leaves nothing for the next.

ComfyUI loads the node itself, by the file that the install command writes.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfyui import Said, start
from torch import Tensor, nn

from specdiff.integrations.comfyui.__main__ import install
from specdiff.plan import Plan

STEPS = 12
PLAN = Plan.of(STEPS, (0, 1, 3, 6, 9, 11))
EVERY_STEP = Plan.every(1)
CFG_PP = (
    "euler_cfg_pp",
    "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp",
    "gradient_estimation_cfg_pp",
    "dpmpp_2s_ancestral_cfg_pp",
)
TEXT = 24
"""Width of the text of models that let it be chosen."""


@dataclass(frozen=True)
class Model:
    """A model of `comfy.supported_models`."""

    config: str
    sizes: dict[str, Any]
    text: int
    """Width of its text."""
    latent: tuple[int, ...]
    pooled: int = 0
    masked: bool = False
    """Whether its text has a mask."""


MODELS = {
    "FLUX": Model("Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 16,
        "context_in_dim": TEXT, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    }, TEXT, (1, 16, 16, 16), 16),
    "FLUX.2": Model("Flux2", {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
        "context_in_dim": TEXT, "hidden_size": 64, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1,
        "qkv_bias": False, "ops_bias": False, "guidance_embed": True, "global_modulation": True,
        "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    }, TEXT, (1, 128, 16, 16)),
    "SD3": Model("SD3", {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "num_patches": 256,
        "adm_in_channels": 16, "pos_embed_scaling_factor": None, "pos_embed_max_size": 16,
        "qk_norm": "rms", "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128},
        },
    }, TEXT, (1, 16, 16, 16), 16),
    "Qwen-Image": Model("QwenImage", {
        "image_model": "qwen_image", "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "axes_dims_rope": (8, 12, 12),
    }, TEXT, (1, 16, 1, 16, 16)),
    "Wan 2.1": Model("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 128, "freq_dim": 32,
        "text_dim": TEXT, "num_heads": 2, "num_layers": 2,
    }, TEXT, (1, 16, 3, 16, 16)),
    "Lumina 2": Model("Lumina2", {
        "image_model": "lumina2", "in_channels": 16, "dim": 72, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True,
        "cap_feat_dim": TEXT, "axes_dims": [12, 12, 12], "axes_lens": [300, 512, 512],
    }, TEXT, (1, 16, 16, 16), masked=True),
    "Z-Image": Model("ZImage", {
        "image_model": "lumina2", "in_channels": 16, "dim": 256, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True,
        "cap_feat_dim": TEXT, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512],
        "ffn_dim_multiplier": 8 / 3, "rope_theta": 256.0, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }, TEXT, (1, 16, 16, 16), masked=True),
    "Chroma": Model("Chroma", {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": TEXT,
        "vec_in_dim": None, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "txt_ids_dims": [], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 64,
        "n_layers": 1,
    }, TEXT, (1, 16, 16, 16)),
    "SD 1.5": Model("SD15", {
        "in_channels": 4, "out_channels": 4, "image_size": 32, "model_channels": 32,
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "context_dim": TEXT, "use_spatial_transformer": True, "legacy": False, "num_heads": 2,
        "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False,
    }, TEXT, (1, 4, 16, 16)),
}  # fmt: skip


class Loaded:
    """A model with random weights in a patcher of ComfyUI's; notes the time of each call."""

    def __init__(self, model: Model) -> None:
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models

        config = getattr(comfy.supported_models, model.config)({**model.sizes})
        config.unet_config["dtype"] = torch.float32
        self._sample, self._model = comfy.sample, model
        self.net = config.get_model({}, "").eval()
        randomize(self.net.diffusion_model)
        self.times: list[float] = []
        self.calls = 0
        self.net.diffusion_model.register_forward_pre_hook(self._called)
        cpu = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.net, load_device=cpu, offload_device=cpu
        )

    def _called(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls += 1
        time = float(args[1].flatten()[0])
        if not self.times or self.times[-1] != time:
            self.times.append(time)

    def conditions(self, seed: int, length: int = 7, **more: Any) -> list[Any]:
        """Text [1, length, width]."""
        numbers = torch.Generator().manual_seed(seed)
        text = torch.randn(1, length, self._model.text, generator=numbers)
        pooled = torch.randn(1, self._model.pooled, generator=numbers)
        more["pooled_output"] = pooled if self._model.pooled else None
        more["attention_mask"] = torch.ones(1, length, dtype=int) if self._model.masked else None
        return [[text, more]]

    def draw(self, model: Any, form: Form) -> Tensor:
        """A latent; notes calls and times."""
        self.times, self.calls = [], 0
        latent = torch.zeros(self._model.latent)
        if form.starts_from_a_picture:
            latent += torch.randn(latent.shape, generator=torch.Generator().manual_seed(9)) * 0.5
        noise = self._sample.prepare_noise(latent, 0)
        positive, negative = form.conditions(self)
        model = form.changed(model)
        mask = torch.zeros(1, 1, *latent.shape[-2:]) if form.inpaints else None
        if mask is not None:
            mask[..., 4:12, 4:12] = 1
        made: Tensor = self._sample.sample(
            model, noise, STEPS, form.guidance, form.sampler, "simple", positive, negative, latent,
            denoise=form.denoise, noise_mask=mask, disable_pbar=True, seed=0,
        )  # fmt: skip
        return made


def _two(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    return loaded.conditions(1), loaded.conditions(2)


def _lengths(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    return loaded.conditions(1), loaded.conditions(2, length=5)


def _areas(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    areas = loaded.conditions(3, area=(16, 8, 0, 0)), loaded.conditions(4, area=(8, 12, 4, 2))
    return [*loaded.conditions(1), *areas[0], *areas[1]], loaded.conditions(2)


def _masks(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :6] = 1
    return [
        *loaded.conditions(3, mask=mask, mask_strength=1.0),
        *loaded.conditions(4, mask=1 - mask, mask_strength=0.7),
    ], loaded.conditions(2)


def _spans(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    early = loaded.conditions(1, start_percent=0.0, end_percent=0.5)
    late = loaded.conditions(3, start_percent=0.5, end_percent=1.0)
    return [*early, *late], loaded.conditions(2)


def _control(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    from comfy.controlnet import ControlBase

    class Control(ControlBase):  # type: ignore[misc]
        """Adds to the picture's tokens during the first half."""

        def get_control(self, x: Tensor, t: Tensor, *_: Any) -> dict[str, list[Tensor]] | None:
            late = self.timestep_range is not None and t[0] < self.timestep_range[1]
            added = {"input": [torch.full((len(x), 64, 64), 0.3)], "output": []}
            return None if late else added

    control = Control().set_cond_hint(torch.zeros(1, 3, 8, 8), 1.0, (0.0, 0.5))
    return loaded.conditions(1, control=control), loaded.conditions(2, control=control)


def _same(model: Any) -> Any:
    return model


def _with_lora(model: Any) -> Any:
    """A clone whose largest weight is patched in place while it is loaded."""
    clone = model.clone()
    weights = clone.model.state_dict()
    name = max(
        (name for name in weights if name.endswith(".weight")), key=lambda n: weights[n].numel()
    )
    numbers = torch.Generator().manual_seed(3)
    change = torch.randn(weights[name].shape, generator=numbers) * 0.1
    clone.add_patches({name: ("diff", (change,))})
    return clone


@dataclass(frozen=True)
class Form:
    """A way to sample."""

    conditions: Callable[[Loaded], tuple[list[Any], list[Any]]] = _two
    guidance: float = 1.0
    sampler: str = "euler"
    denoise: float = 1.0
    inpaints: bool = False
    one_by_one: bool = False
    starts_from_a_picture: bool = False
    changed: Callable[[Any], Any] = _same
    like: str = ""
    """The form with whose latent its own is compared."""
    only: str = ""
    """The model that it is for."""


FORMS = {
    "alone": Form(),
    "guided": Form(guidance=4.0),
    "guided, one by one": Form(guidance=4.0, one_by_one=True, like="guided"),
    "guided, texts of two lengths": Form(_lengths, 4.0),
    "guided, areas": Form(_areas, 4.0),
    "guided, masks": Form(_masks, 4.0),
    "guided, another prompt half-way": Form(_spans, 4.0),
    "guided, inpainting": Form(guidance=4.0, inpaints=True, starts_from_a_picture=True),
    "from a picture": Form(denoise=0.6, starts_from_a_picture=True),
    "heun": Form(sampler="heun"),
    "dpmpp_2m": Form(sampler="dpmpp_2m"),
    "euler_ancestral": Form(sampler="euler_ancestral"),
    **{
        f"guided, {sampler}": Form(guidance=1.5, sampler=sampler, only="FLUX") for sampler in CFG_PP
    },
    "guided, ControlNet until half-way": Form(_control, 4.0, only="FLUX"),
    "LoRA": Form(changed=_with_lora),
    "alone, again": Form(like="alone"),
}


def randomize(model: nn.Module) -> None:
    """Weights that pass numbers on at their size."""
    numbers = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 0
        values = torch.randn(parameter.shape, generator=numbers) * (fan**-0.5 if fan else 0.1)
        parameter.data.copy_(values if fan else values + (parameter.dim() == 1) * 0.5)
    for name, buffer in model.named_buffers():
        if name == "pos_embed":  # empty until it is loaded
            buffer.data.copy_(torch.randn(buffer.shape, generator=numbers))


class Table:
    """Lines of the table."""

    def __init__(self, node: Any, said: Said, folder: Path) -> None:
        self._node, self._said = node, said
        self._plans = {"plan": folder / "plan.json", "every": folder / "every.json"}
        PLAN.save(self._plans["plan"])
        EVERY_STEP.save(self._plans["every"])

    def lines(self, name: str, forms: list[str]) -> list[str]:
        """Those of one model."""
        loaded, made = Loaded(MODELS[name]), dict[str, Tensor]()
        wanted = [form for form in forms if FORMS[form].only in ("", name)]
        return [self._line(name, form, loaded, made) for form in wanted]

    def _line(self, name: str, form_name: str, loaded: Loaded, made: dict[str, Tensor]) -> str:
        import comfy.model_management

        form, free = FORMS[form_name], comfy.model_management.get_free_memory
        if form.one_by_one:
            comfy.model_management.get_free_memory = lambda *_, **__: 0
        try:
            alone, calls = loaded.draw(loaded.patcher, form), loaded.calls
            off = loaded.draw(self._patched(loaded, quality="dense"), form)
            every = loaded.draw(self._patched(loaded, plan=str(self._plans["every"])), form)
            planned = loaded.draw(self._patched(loaded, plan=str(self._plans["plan"])), form)
        finally:
            comfy.model_management.get_free_memory = free
        made[form_name] = planned
        line = self._said.line
        total, computed = (int(n) for n in re.findall(r"(\d+) (?:evaluations|computed)", line))
        same = f"{_apart(planned, made[form.like])} to {form.like!r}" if form.like in made else ""
        return (
            f"| {name} | {form_name} | {_apart(off, alone)} | {_apart(every, alone)} | {calls}"
            f" | {loaded.calls} | {total} | {computed} | {_apart(planned, alone)} | {same}"
            f" | {line.partition('Computed: ')[2]} |"
        )

    def _patched(self, loaded: Loaded, quality: str = "balanced", plan: str = "") -> Any:
        return self._node.execute(model=loaded.patcher, quality=quality, plan=plan).args[0]


def node(folder: Path) -> Any:
    """The node, installed in a folder and loaded as ComfyUI does."""
    import nodes

    (folder / "custom_nodes").mkdir()
    if not asyncio.run(nodes.load_custom_node(str(install(folder)))):
        raise RuntimeError("ComfyUI did not load the node")
    return nodes.NODE_CLASS_MAPPINGS["Specdiff"]


def _apart(one: Tensor, other: Tensor) -> str:
    if not (one.isfinite().all() and other.isfinite().all()):
        return "not finite"
    if torch.equal(one, other):
        return "same bits"
    return f"{float((one - other).norm() / other.norm()):.1e}"


HEAD = (
    '| model | form | "dense" | plan of every step | calls | calls with a plan | evaluations'
    " | computed | distance | the same, another way | why computed |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--markdown", type=Path, help="file that the table is added to")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    start(given.checkout)
    import comfyui_version

    said = Said()
    lines = [
        f"\nComfyUI {comfyui_version.__version__}, torch {torch.__version__},"
        f" {datetime.date.today()}.\n",
        HEAD,
    ]
    with tempfile.TemporaryDirectory() as folder:
        table = Table(node(Path(folder)), said, Path(folder))
        for name in given.models:
            new = table.lines(name, given.forms)
            lines += new
            print(*new, sep="\n", flush=True)
    if given.markdown is not None:
        with given.markdown.open("a", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
