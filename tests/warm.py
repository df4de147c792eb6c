"""One process of `tests.test_warm_start`: compile a small model, or load what another compiled.

python -m tests.warm save|load FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import specdiff
from tests.models import flux


def main(action: str, file: str) -> None:
    """Print, as JSON, what was compiled, what came from the cache, and the last output."""
    if action == "load":
        assert torch.compiler.load_cache_artifacts(Path(file).read_bytes()) is not None
    model, inputs = flux(batch=1)
    options = {"method": "paper", "cache_ratio": 0.5}
    compiled = torch.compile(model, backend="specdiff", fullgraph=True, options=options)
    latent = inputs.pop("hidden_states")
    with torch.no_grad():
        for sigma in (1.0, 0.9, 0.8, 0.7, 0.6):
            inputs["timestep"] = torch.full((1,), sigma)
            latent = latent - 0.1 * compiled(latent, **inputs)[0]
    if action == "save":
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        Path(file).write_bytes(artifacts[0])
    found = {
        "programs": dict(specdiff.stats(compiled).compile_seconds),
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "latent": latent.flatten().tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
