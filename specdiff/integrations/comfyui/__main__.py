"""Installs the node: `python -m specdiff.integrations.comfyui path/to/ComfyUI`.

A file of one line in `custom_nodes`, which imports the node from the installed package: works
without the rights that links need on Windows, and follows every update of specdiff.
"""

from __future__ import annotations

import sys
from pathlib import Path

FILE = "specdiff_node.py"
CONTENT = "from specdiff.integrations.comfyui import comfy_entrypoint  # noqa: F401\n"


def install(comfyui: Path) -> Path:
    """Write the file that loads the node; again does no harm.

    Raises:
        NotADirectoryError: the folder has no `custom_nodes`.
    """
    folder = comfyui / "custom_nodes"
    if not folder.is_dir():
        raise NotADirectoryError(f"{comfyui} has no folder custom_nodes: give the one of ComfyUI")
    file = folder / FILE
    file.write_text(CONTENT, encoding="utf-8")
    return file


def main(arguments: list[str]) -> int:
    """0 when done, 2 on an error of the caller's."""
    if len(arguments) != 1:
        print("usage: python -m specdiff.integrations.comfyui path/to/ComfyUI", file=sys.stderr)
        return 2
    try:
        file = install(Path(arguments[0]))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file}; restart ComfyUI, the node is under model_patches as specdiff")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
