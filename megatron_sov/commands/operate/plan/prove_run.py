"""Runs `megatron-sov plan --prove`."""

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.commands.operate.plan.plan import LayoutProof
from megatron_sov.commands.operate.plan.tuning_run import request_plan
from megatron_sov.plan.on_cluster import placed
from megatron_sov.plan.pricing import machines
from megatron_sov.proof.proving import EQUAL, as_json, as_text, prove_run


def prove_layout(proof: LayoutProof) -> int:
    """Train two steps in the planned layout and in one process, print the comparison, and return exit code 3
    if losses, gradients, weights or states differ."""
    options, request = proof.options, request_plan(proof.options)
    if options.cluster is not None:
        where = machines(options.cluster, options.nodes)
        config, num_ranks = placed(request, where).config, where.num_ranks
    else:
        config = request.config()
        num_ranks = options.nproc or config.parallel.min_ranks
    small, verdict = prove_run(config, num_ranks)
    print(format_json(as_json(small, verdict)) if options.json else as_text(small, verdict))
    return ExitCode.OK if verdict.outcome == EQUAL else ExitCode.GATE_FAILED
