"""Switch: a serving stack compiles with specdiff because an environment variable says so.

    SPECDIFF=balanced vllm serve ... --omni --diffusion-compile-granularity full
    SPECDIFF=plan.json sglang generate ... --enable-torch-compile

Stacks load entry points of their plug-in groups in every worker (`pyproject.toml`). Without the
variable they do nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specdiff import torch_adapter
from specdiff.compiler import backend, is_for_all
from specdiff.errors import OptionError
from specdiff.settings import OFF, QUALITIES, SWITCH

logger = logging.getLogger(__name__)


def switch_on() -> None:
    """Make specdiff what `torch.compile` uses where it is given no backend, if SPECDIFF says how.

    SPECDIFF is a quality, such as "balanced", or the path of a plan. Unset, "off" or "dense":
    nothing happens. Compiled modules that denoise nothing, such as a VAE, are compiled by Inductor
    as before. May be called again.

    Raises:
        OptionError: SPECDIFF is something else, or the plan cannot be read.
    """
    options = options_of(os.environ.get(SWITCH, ""))
    if options is None:
        return
    present = torch_adapter.default_backend()
    if present is None:
        logger.warning(
            '%s is set, but torch %s has no default backend: give torch.compile backend="specdiff"',
            SWITCH,
            torch.__version__,
        )
    elif present != "inductor" and not is_for_all():
        logger.warning("%s is set, but %r is the default backend already", SWITCH, present)
    else:
        torch_adapter.set_default_backend(backend(**options))


def options_of(value: str) -> Mapping[str, Any] | None:
    """The options that a value of SPECDIFF stands for; None: it switches nothing on.

    Raises:
        OptionError: it is no quality, nor the path of a plan.
    """
    value = value.strip()
    if value.lower() in ("", "off", OFF):
        return None
    if value in QUALITIES:
        return {"quality": value}
    if Path(value).is_file():
        return {"plan": value}
    names = ", ".join(QUALITIES)
    raise OptionError(f"{SWITCH}={value!r}: must be off, one of {names}, or the path of a plan")
