"""A stage is built without memory wherever one plans: on a machine with a GPU CUDA is not started."""

from __future__ import annotations

import subprocess
import sys

PLANS = """
import torch

def starts() -> None:
    raise RuntimeError("CUDA was started")

torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = starts
from megatron_sov import recipes
from megatron_sov.mcore.model.meta import built_stage
from megatron_sov.plan.stages import stage_params

config = recipes.get("tiny-k-exaone")
assert [built_stage(config, 8, 0).params] == stage_params(config)
assert not torch.cuda.is_initialized()
"""


def test_a_stage_is_built_on_a_machine_with_a_gpu_that_is_not_asked() -> None:
    """A double of a GPU that cannot be started."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLANS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
