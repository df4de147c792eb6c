"""A real local Ray cluster, whose sockets stay in a network namespace of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.small import flux_folder

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--net", "--map-root-user", "--"]
LOOPBACK_UP = "ip link set lo up && exec "


def in_a_namespace(folder: Path, what: str) -> dict[str, Any]:
    """Run a part of `ray_alone` where no other machine can be reached; what it found."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('replicas need Ray: pip install -e ".[serve]"')
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("no unshare and ip: Ray would listen on all interfaces")
    if subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip("no network namespaces here: Ray would listen on all interfaces")
    flux_folder(folder / "flux")
    told = folder / "told.json"
    call = f"{sys.executable} -m tests.serve.ray_alone {what} {folder / 'flux'} {told}"
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", LOOPBACK_UP + call],
        cwd=ROOT,
        env={**os.environ, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(told.read_text())


@pytest.mark.slow
def test_a_replica_killed_in_mid_picture_loses_none(tmp_path: Path) -> None:
    assert in_a_namespace(tmp_path, "killed") == {
        "ready": 200,
        "wrong": 400,
        "statuses": [200] * 4,
        "same": [True] * 4,
        "counted": True,
    }


@pytest.mark.slow
def test_ray_serves_the_application_itself(tmp_path: Path) -> None:
    assert in_a_namespace(tmp_path, "front") == {"picture": 200, "wrong": 400}
