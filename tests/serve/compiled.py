"""A server's engine as another process starts it from a file of compiled programs.

python -m tests.serve.compiled FOLDER ARTIFACTS
"""

from __future__ import annotations

import json
import sys

from torch._dynamo.utils import counters

from specdiff.serve.start import Wish, engine_of, warm_up


def main(folder: str, artifacts: str) -> None:
    """Print, as JSON, what came from the file and whether pictures can be drawn."""
    wish = Wish(folder, compile=True, artifacts=artifacts)
    engine = engine_of(wish)
    warm_up(engine, wish)
    found = {
        "not_ready": engine.why_not_ready(),
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
    }
    engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
