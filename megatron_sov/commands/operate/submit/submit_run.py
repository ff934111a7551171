"""Run `megatron-sov submit STAGE`."""

from megatron_sov.base.command_line import import_reference
from megatron_sov.base.errors import ExitCode, Fix, UserError
from megatron_sov.commands.operate.submit.job_summary import check_data, show_dry_run, summarize
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.operate.slurm import submission
from megatron_sov.operate.slurm.stages import STAGES, SubmitOptions, check_inputs, check_stage
from megatron_sov.work.clusters import cluster

PROVE = "megatron_sov.commands.operate.submit.prove_run:prove_layouts"
"""Imported for --prove only, because it imports torch."""


def submit_stage(stage: str, argv: list[str], options: SubmitOptions) -> int:
    """Submit a job for a stage, and return 0, or 3 if --prove finds a difference."""
    if options.continue_chain:
        raise UserError("--continue: belongs to a chain; a stage continues by itself when it is "
                        "submitted again")
    if options.scripts is not None:
        raise UserError(f"--scripts {options.scripts}: belongs to a chain; "
                        "--dry-run prints the script of a stage")
    check_stage(stage)
    cluster_name = _get_cluster(options, stage)
    profile = cluster.load_profile(cluster_name, account=options.account, partition=options.partition)
    request = submission.SubmitRequest(stage, tuple(argv), profile, options.nodes or 1, options.min_nodes,
                                       cluster.parse_node_settings(options.nodes_set), options.array,
                                       time_limit=options.time_limit, cluster=cluster_name,
                                       engine_nodes=options.engine_nodes)
    prepared = submission.prepare_stage(request, STAGE_PARSERS, check_data)
    if options.prove and prepared.work.config is None:
        raise UserError(f"--prove: checks the layout of a training stage, and {stage} has no layout; leave "
                        "it out")
    if not options.dry_run:
        check_inputs(prepared.work, set())
    if options.prove and not import_reference(PROVE)(prepared):
        return ExitCode.GATE_FAILED
    if options.dry_run:
        show_dry_run(prepared)
        return 0
    # last, because Slurm is slow
    submission.check_with_slurm(prepared)
    numbers = submission.submit_jobs(prepared, [])
    print(f"submitted {stage} as job {' and '.join(numbers)}\nscript: {prepared.jobs[0].script}\n"
          f"log:    {prepared.work.records}/{numbers[0]}{'_*' if options.array else ''}.log")
    print("".join(f"{line}\n" for line in summarize(prepared)), end="")
    return 0


def _get_cluster(options: SubmitOptions, stage: str) -> str:
    """Return --cluster; the error for a missing --cluster proposes further missing options."""
    if options.cluster is not None:
        return options.cluster
    advice = [f"pass one of {', '.join(cluster.list_profiles())}, or your own YAML file"]
    if options.account is None:
        advice.append("--account NAME if your Slurm asks for one")
    if options.nodes is None:
        advice.append("--nodes N (default 1)")
    advice.append("--partition and --time replace the profile's")
    proposals = [("--cluster", "h100", options.cluster), ("--account", "ACCOUNT", options.account),
                 ("--nodes", "1", options.nodes if STAGES[stage].ranks else 1)]  # no ranks, no --nodes
    missing = [word for name, example, value in proposals if value is None for word in (name, example)]
    raise UserError(f"--cluster: is missing; {'; '.join(advice)}", Fix(options=tuple(missing)))
