"""Put a run's weights and the prompts' embeddings where the package ships them.

    python -m emoji.export RUN_FOLDER        (from examples/training)

Run it from any checkout with the extra `text` installed.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from specdiff.models.demo import DATA, PROMPTS, WEIGHTS, encode_text

from .prompts import BUILT_IN_PROMPTS, HELD_OUT_PROMPTS, TRAINED_PROMPTS


def write_prompts() -> None:
    """Store the embeddings as float16 with the prompt lists in the metadata."""
    known = [*TRAINED_PROMPTS, *HELD_OUT_PROMPTS]
    prompts = [*BUILT_IN_PROMPTS, *(one for one in known if one not in BUILT_IN_PROMPTS)]
    tokens, pooled = encode_text(prompts)
    lists = {"built_in": BUILT_IN_PROMPTS, "all": prompts, "held_out": HELD_OUT_PROMPTS}
    save_file(
        {"tokens": tokens.half(), "pooled": pooled.half()},
        PROMPTS,
        metadata={name: json.dumps(value) for name, value in lists.items()},
    )


def main() -> None:
    """Export the run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the training's --work folder")
    arguments = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    shutil.copyfile(arguments.run / "emoji.safetensors", WEIGHTS)
    write_prompts()
    for file in (WEIGHTS, PROMPTS):
        file.chmod(0o644)  # safetensors writes for the owner alone


if __name__ == "__main__":
    main()
