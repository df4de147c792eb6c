"""What one process compiled serves another: Inductor's caches know the emitted programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def process(action, file, folder):
    """The report of one process of `tests.warm` with a cache folder of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.warm", action, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_artifacts_and_warm_caches_serve_another_process(tmp_path):
    file = tmp_path / "artifacts"
    cold = process("save", file, tmp_path / "first")
    compiled = {name for name in cold["programs"] if name != "tail"}
    assert compiled == {"dense", "selective_21"}
    assert (cold["hits"], cold["misses"]) == (0, 2)
    elsewhere = process("load", file, tmp_path / "second")
    assert (elsewhere["hits"], elsewhere["misses"]) == (2, 0)
    assert elsewhere["latent"] == cold["latent"]
    # on a CPU the artifacts hold sources, which are built again; a folder that is kept holds all
    again = process("load", file, tmp_path / "first")
    assert (again["hits"], again["misses"]) == (2, 0)
    # ready in a tenth of the time, what is traced and emitted anew included
    assert sum(again["programs"].values()) < sum(cold["programs"].values()) / 10
