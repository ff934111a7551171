"""Kernels of the libraries that models reach on a GPU alone: run by Triton's interpreter, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import triton_interpreter

GPU = Path(triton_interpreter.__file__).parent

@pytest.fixture(scope="module")
def path() -> str:
    """What PYTHONPATH has to be for Triton to be found."""
    try:
        folder = triton_interpreter.triton_folder()
        triton_interpreter.megatrons()
    except OSError as e:
        pytest.skip(str(e))
    return os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.deep
def test_their_results_are_those_of_the_double_and_of_torch(path: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", GPU / "triton_interpreter.py", "--quick"],
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 35 and all(case["error"] <= case["limit"] for case in cases)
    assert {case["case"].partition(":")[0] for case in cases} == {
        "Transformer Engine 2.20.2", *(f"megatron-core {v}" for v in triton_interpreter.megatrons())}


COMPILES = """
import compile_kernels, triton, triton.language as tl, torch
@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
@triton.jit
def wrong(x):
    tl.store(x, missing)
found = compile_kernels.compile_in_place_of_launches(100)
x = torch.empty(100000, device="meta")
add[(10,)](x, x, 100000, BLOCK=256)
wrong[(1,)](x)
print(found["add"].worst, found["add"].problems, found["wrong"].worst, len(found["wrong"].problems))
"""


@pytest.mark.deep
def test_a_launch_compiles_and_tells_registers(path: str, tmp_path: Path) -> None:
    script = tmp_path / "launches.py"  # Triton reads sources of kernels
    script.write_text(COMPILES)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(GPU), path]),
             "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    spills, registers = map(int, done.stdout.partition(")")[0].strip("(").split(","))
    assert spills == 0 and 8 <= registers <= 64
    assert done.stdout.strip().endswith("set() (-1, -1) 1")
