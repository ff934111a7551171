"""Runs `megatron-sov submit --prove`."""

import sys

from megatron_sov.model.config import apply_settings
from megatron_sov.operate.slurm.submission import PreparedStage
from megatron_sov.proof.layout_proof import EQUAL, format_proof, prove_run


def prove_layouts(prepared: PreparedStage) -> bool:
    """Print and return whether every layout of a training stage computes the same results as one process."""
    config = prepared.work.config
    assert config is not None
    [job] = prepared.jobs
    for nodes, settings in job.layouts.items():
        small, verdict = prove_run(apply_settings(config, list(settings)), nodes * job.profile.tasks_per_node)
        print(format_proof(small, verdict), file=sys.stderr)  # stdout may be redirected to a script file
        if verdict.outcome != EQUAL:
            return False
    return True
