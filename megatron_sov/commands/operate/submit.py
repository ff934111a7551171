"""`megatron-sov submit STAGE --cluster P --nodes N ARGUMENTS...` and `megatron-sov submit chain CHAIN`."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.commands import COMMANDS as PROGRAMS
from megatron_sov.operate.slurm import chain, submission
from megatron_sov.operate.slurm.stages import STAGES, Commands, SubmitOptions, check_inputs
from megatron_sov.work.clusters import cluster, kubernetes

OF_SLURM = ("min_nodes", "nodes_set", "array", "account", "partition", "scripts", "continue_chain")
"""Options that mean nothing on Kubernetes."""
OF_KUBERNETES = ("job_name", "manifest", "apply")
"""Options that mean nothing on Slurm."""


def _declare_eval_lm(parser: argparse.ArgumentParser) -> None:
    """Declare what `eval lm` takes, a stage of its own since several jobs may share it."""
    from megatron_sov.commands.evaluate.eval_lm import EvalLmOptions

    add_options(parser, EvalLmOptions)


def _declare(command: str, parser: argparse.ArgumentParser) -> None:
    """Declare what a command takes; it is imported now."""
    PROGRAMS[command.replace("-", " ")].load().add_arguments(parser)


COMMANDS: Commands = {"eval-lm": _declare_eval_lm} | {name: partial(_declare, name) for name in (
    "pretrain", "extend", "sft", "prefer", "distill", "convert", "eval", "rl-run", "rl-train", "rl-generate",
    "rl-reward")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; its options may stand before the stage or among the
    stage's own arguments."""
    parser.epilog = ("ARGUMENTS are what follows the stage's own command: megatron-sov pretrain, extend, "
                     "sft, prefer, distill, convert, eval, eval lm, rl run, rl train, rl generate, rl "
                     "reward; sov-tokenizer; sov-data.  Chains that come "
                     f"with the package, besides files of your own: {', '.join(chain.chain_names())}.")
    parser.add_argument("stage", metavar="STAGE", help=f"{', '.join(STAGES)}, or chain: several, from a file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER,
                        help="the stage's own, or the chain's file")
    add_options(parser, SubmitOptions)


def run(typed: argparse.Namespace) -> int:
    """Submit; returns 0 when Slurm has the job."""
    parser = Parser(prog="megatron-sov submit", add_help=False, allow_abbrev=False)
    add_options(parser, SubmitOptions)
    typed, argv = parser.parse_known_args(typed.arguments, typed)
    options = read_options(SubmitOptions, typed)
    if options.cluster is not None and kubernetes.is_kubernetes(options.cluster):
        return _kubernetes(typed.stage, argv, options.cluster, options)
    if given := [name for name in OF_KUBERNETES if getattr(options, name)]:
        raise UserError(f"{_option(given[0])}: belongs to Kubernetes; leave it out, or pass --cluster with a "
                        f"profile of kind k8s ({', '.join(kubernetes.names())}, or a file of your own)")
    return _chain(argv, options) if typed.stage == "chain" else _stage(typed.stage, argv, options)


def _stage(stage: str, argv: list[str], options: SubmitOptions) -> int:
    if options.continue_chain:
        raise UserError("--continue: belongs to a chain; a stage continues by itself when it is "
                        "submitted again")
    if options.scripts is not None:
        raise UserError(f"--scripts {options.scripts}: belongs to a chain; "
                        "--dry-run prints the script of a stage")
    profile = cluster.load(_cluster_name(options), account=options.account, partition=options.partition)
    request = submission.SubmitRequest(stage, tuple(argv), profile, options.nodes or 1, options.min_nodes,
                                       cluster.settings_by_nodes(options.nodes_set), options.array,
                                       time_limit=options.time_limit, cluster=_cluster_name(options))
    prepared = submission.prepare(request, COMMANDS)
    if options.dry_run:
        submission.show(prepared)
        return 0
    check_inputs(prepared.work, set())
    submission.check(prepared)
    numbers = submission.submit(prepared, [])
    print(f"submitted {stage} as job {' and '.join(numbers)}\nscript: {prepared.jobs[0].script}\n"
          f"log:    {prepared.work.records}/{numbers[0]}{'_*' if options.array else ''}.log")
    return 0


def _kubernetes(stage: str, argv: list[str], cluster_name: str, options: SubmitOptions) -> int:
    """Make a manifest of a stage; returns 0 when it is where the user wants it."""
    from megatron_sov.operate.kubernetes import prepare

    if stage == "chain":
        raise UserError("submit chain: several jobs that wait for one another, which a TrainJob does not; "
                        "submit each stage when the one before is complete")
    if given := [name for name in OF_SLURM if getattr(options, name)]:
        raise UserError(f"{_option(given[0])}: belongs to Slurm; leave it out where --cluster names a "
                        "profile of kind k8s")
    if not (options.dry_run or options.manifest or options.apply):
        raise UserError("--cluster names a profile of kind k8s: say what becomes of the manifest; --dry-run "
                        "prints it, --manifest FILE writes it, --apply has `kubectl create` make the job")
    if options.dry_run and (options.manifest or options.apply):
        raise UserError("--dry-run: prints the manifest and does nothing else; leave it out beside "
                        "--manifest and --apply")
    profile = kubernetes.load(cluster_name)
    check_output("--manifest", options.manifest)
    text = prepare(stage, argv, profile, COMMANDS, nodes=options.nodes or 1, name=options.job_name,
                   time_limit=options.time_limit)
    if options.dry_run:
        sys.stdout.write(text)
    if options.manifest:
        write_output(options.manifest, text)
        print(options.manifest)
    if options.apply:
        print(kubernetes.kubectl("create", "-f", "-", text=text, way_out="write the manifest with --manifest "
                                 "FILE and create it elsewhere"))
    return 0


def _option(name: str) -> str:
    return f"--{name.removesuffix('_chain').replace('_', '-')}"


def _chain(argv: list[str], options: SubmitOptions) -> int:
    if len(argv) != 1:
        raise UserError(f"submit chain: takes one file, not {' '.join(argv) or 'none'}; stages and their "
                        f"arguments stand in it (chains of the package: {', '.join(chain.chain_names())})")
    given = [name for name in ("nodes", "min_nodes", "nodes_set", "array") if getattr(options, name)]
    if given:
        raise UserError(f"submit chain: --{given[0].replace('_', '-')} belongs to a stage; "
                        f"write it into {argv[0]}")
    if options.scripts is not None and (options.dry_run or options.continue_chain):
        raise UserError(f"--scripts {options.scripts}: submits nothing; leave out --dry-run and --continue")
    if options.scripts is None:
        return chain.submit_chain(argv[0], options, COMMANDS)
    for script in chain.write_scripts(argv[0], options.scripts, options, COMMANDS):
        print(script)
    return 0


def _cluster_name(options: SubmitOptions) -> str:
    if options.cluster is None:
        raise UserError(f"--cluster: is missing; pass one of {', '.join(cluster.names())}, "
                        "or a YAML file of your own")
    return options.cluster
