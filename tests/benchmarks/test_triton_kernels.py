"""Triton kernels that our models reach only on a GPU: run in Triton's interpreter, and compiled."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import triton_interpreter

GPU = Path(triton_interpreter.__file__).parent


@pytest.fixture(scope="module")
def path() -> str:
    """PYTHONPATH with which Triton can be imported."""
    try:
        folder = triton_interpreter.find_triton_folder()
    except OSError as e:
        pytest.skip(str(e))
    return os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.deep
def test_their_results_are_those_of_the_double_and_of_torch(path: str) -> None:
    completed = subprocess.run([sys.executable, "-W", "ignore", GPU / "triton_interpreter.py", "--quick"],
                               capture_output=True, text=True, check=False, env={**os.environ,
                                                                                 "PYTHONPATH": path})
    assert completed.returncode == 0, completed.stdout + completed.stderr[-2000:]
    cases = [json.loads(line) for line in completed.stdout.splitlines()]
    assert len(cases) == 25 and all(case["error"] <= case["limit"] for case in cases)
    assert {case["case"].partition(":")[0] for case in cases} == {
        "Transformer Engine 2.20.2", f"megatron-core {version('megatron-core')}"}
