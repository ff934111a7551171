"""Runs `megatron-sov plan --prove`."""

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.commands.operate.plan.plan import LayoutProof
from megatron_sov.commands.operate.plan.tuning_run import request_plan
from megatron_sov.plan.cluster_plan import plan_on_cluster
from megatron_sov.plan.pricing import load_machines
from megatron_sov.proof.layout_proof import EQUAL, format_proof, proof_to_json, prove_run


def prove_layout(proof: LayoutProof) -> int:
    """Train two steps in the planned layout and in one process, print the comparison, and return exit code 3
    if losses, gradients, weights or states differ."""
    options, request = proof.options, request_plan(proof.options)
    if options.cluster is not None:
        where = load_machines(options.cluster, options.nodes)
        config, num_ranks = plan_on_cluster(request, where).config, where.num_ranks
    else:
        config = request.config()
        num_ranks = options.nproc or config.parallel.min_ranks
    small, verdict = prove_run(config, num_ranks)
    print(format_json(proof_to_json(small, verdict)) if options.json else format_proof(small, verdict))
    return ExitCode.OK if verdict.outcome == EQUAL else ExitCode.GATE_FAILED
