"""`megatron-sov submit STAGE --cluster P --nodes N ARGUMENTS...` and `megatron-sov submit chain CHAIN`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_sov.clusters import cluster, kubernetes
from megatron_sov.errors import UserError
from megatron_sov.settings import add_options
from megatron_sov.slurm import chain_file
from megatron_sov.slurm.stages import STAGES, Commands

DEFAULTS: dict[str, Any] = {
    "cluster": None, "nodes": None, "min_nodes": None, "nodes_set": [], "array": 0, "account": None,
    "partition": None, "time": None, "dry_run": False, "continue_chain": False, "scripts": None,
    "job_name": None, "manifest": None, "apply": False}
OF_SLURM = ("min_nodes", "nodes_set", "array", "account", "partition", "scripts", "continue_chain")
"""Options that mean nothing on Kubernetes."""
OF_KUBERNETES = ("job_name", "manifest", "apply")
"""Options that mean nothing on Slurm."""


def _declare_eval_lm(parser: argparse.ArgumentParser) -> None:
    """Declare what `eval lm` takes, a stage of its own since several jobs may share it."""
    from megatron_sov.commands.eval_lm import EvalLmOptions

    add_options(parser, EvalLmOptions)


def _declare(command: str, parser: argparse.ArgumentParser) -> None:
    """Declare what a command takes; it is imported now."""
    module = import_module(f"megatron_sov.commands.{command.replace('-', '_')}")
    module.add_arguments(parser)


COMMANDS: Commands = {"eval-lm": _declare_eval_lm} | {name: partial(_declare, name) for name in (
    "pretrain", "extend", "sft", "prefer", "distill", "convert", "eval", "rl-run", "rl-train", "rl-generate",
    "rl-reward")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; its options may stand before the stage or among the
    stage's own arguments."""
    parser.epilog = ("ARGUMENTS are what follows the stage's own command: megatron-sov pretrain, extend, "
                     "sft, prefer, distill, convert, eval, eval lm, rl run, rl train, rl generate, rl "
                     "reward; sov-tokenizer; sov-data.  Chains that come "
                     f"with the package, besides files of your own: {', '.join(chain_file.names())}.")
    parser.add_argument("stage", metavar="STAGE", help=f"{', '.join(STAGES)}, or chain: several, from a file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER,
                        help="the stage's own, or the chain's file")
    _add_options(parser)
    parser.set_defaults(**DEFAULTS)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="PROFILE",
                        help=f"{', '.join((*cluster.names(), *kubernetes.names()))}, "
                             "or a YAML file of your own")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of a training stage (default 1)")
    parser.add_argument("--min-nodes", type=int, metavar="N",
                        help="go on with as few nodes as this when others are missing")
    parser.add_argument("--nodes-set", action="append", metavar="N:key=value",
                        help="a setting that changes with N nodes")
    parser.add_argument("--array", type=int, metavar="N",
                        help="share the inputs of data pack, or the work of eval-lm, rl-generate and "
                             "rl-reward, out over N jobs")
    parser.add_argument("--account", help="instead of the profile's")
    parser.add_argument("--partition", help="instead of the profile's")
    parser.add_argument("--time", metavar="LIMIT",
                        help="time limit instead of the profile's: minutes, H:MM:SS or D-HH:MM:SS")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would be submitted; writes nothing, needs neither Slurm nor "
                             "Kubernetes")
    parser.add_argument("--scripts", type=Path, metavar="DIR", help="chain: submit nothing, write a script "
                                                                    "of each stage for `sbatch`, "
                                                                    "with paths that begin with $WORK")
    parser.add_argument("--continue", dest="continue_chain", action="store_true",
                        help="chain: submit what is not complete yet")
    parser.add_argument("--job-name", metavar="NAME",
                        help="Kubernetes: instead of the stage's and its folder's")
    parser.add_argument("--manifest", type=Path, metavar="FILE",
                        help="Kubernetes: write the manifest to this file")
    parser.add_argument("--apply", action="store_true",
                        help="Kubernetes: have `kubectl create` make the job")


def run(args: argparse.Namespace) -> int:
    """Submit; returns 0 when Slurm has the job."""
    options = argparse.ArgumentParser(prog="megatron-sov submit", add_help=False, allow_abbrev=False,
                                      argument_default=argparse.SUPPRESS)
    _add_options(options)
    found, argv = options.parse_known_args(args.arguments)
    vars(args).update(vars(found))
    if args.cluster is not None and kubernetes.is_kubernetes(args.cluster):
        return _kubernetes(args, argv)
    if given := [name for name in OF_KUBERNETES if getattr(args, name)]:
        raise UserError(f"{_option(given[0])}: belongs to Kubernetes; leave it out, or pass --cluster with a "
                        f"profile of kind k8s ({', '.join(kubernetes.names())}, or a file of your own)")
    return _chain(args, argv) if args.stage == "chain" else _stage(args, argv)


def _stage(args: argparse.Namespace, argv: list[str]) -> int:
    from megatron_sov.slurm import submission
    from megatron_sov.slurm.stages import check_inputs

    if args.continue_chain:
        raise UserError("--continue: belongs to a chain; a stage continues by itself when it is "
                        "submitted again")
    if args.scripts is not None:
        raise UserError(f"--scripts {args.scripts}: belongs to a chain; "
                        "--dry-run prints the script of a stage")
    profile = cluster.load(_cluster_name(args), account=args.account, partition=args.partition)
    request = submission.Request(args.stage, tuple(argv), profile, 1 if args.nodes is None else args.nodes,
                                 args.min_nodes, cluster.settings_by_nodes(args.nodes_set), args.array,
                                 time_limit=args.time, cluster=_cluster_name(args))
    prepared = submission.prepare(request, COMMANDS)
    if args.dry_run:
        submission.show(prepared)
        return 0
    check_inputs(prepared.work, set())
    submission.check(prepared)
    numbers = submission.submit(prepared, [])
    print(f"submitted {args.stage} as job {' and '.join(numbers)}\nscript: {prepared.jobs[0].script}\n"
          f"log:    {prepared.work.records}/{numbers[0]}{'_*' if args.array else ''}.log")
    return 0


def _kubernetes(args: argparse.Namespace, argv: list[str]) -> int:
    """Make a manifest of a stage; returns 0 when it is where the user wants it."""
    from megatron_sov.kubernetes import submission

    if args.stage == "chain":
        raise UserError("submit chain: several jobs that wait for one another, which a TrainJob does not; "
                        "submit each stage when the one before is complete")
    if given := [name for name in OF_SLURM if getattr(args, name)]:
        raise UserError(f"{_option(given[0])}: belongs to Slurm; leave it out where --cluster names a "
                        "profile of kind k8s")
    if not (args.dry_run or args.manifest or args.apply):
        raise UserError("--cluster names a profile of kind k8s: say what becomes of the manifest; --dry-run "
                        "prints it, --manifest FILE writes it, --apply has `kubectl create` make the job")
    if args.dry_run and (args.manifest or args.apply):
        raise UserError("--dry-run: prints the manifest and does nothing else; leave it out beside "
                        "--manifest and --apply")
    request = submission.Request(args.stage, tuple(argv), kubernetes.load(args.cluster),
                                 1 if args.nodes is None else args.nodes, args.job_name, args.time)
    submission.check_manifest_path(args.manifest)
    text = submission.prepare(request, COMMANDS)
    if args.dry_run:
        sys.stdout.write(text)
    if args.manifest:
        submission.write(args.manifest, text)
        print(args.manifest)
    if args.apply:
        print(submission.create(text))
    return 0


def _option(name: str) -> str:
    return f"--{name.removesuffix('_chain').replace('_', '-')}"


def _chain(args: argparse.Namespace, argv: list[str]) -> int:
    from megatron_sov.slurm import chain
    from megatron_sov.slurm.ready_scripts import write_scripts

    if len(argv) != 1:
        raise UserError(f"submit chain: takes one file, not {' '.join(argv) or 'none'}; stages and their "
                        f"arguments stand in it (chains of the package: {', '.join(chain_file.names())})")
    given = [name for name in ("nodes", "min_nodes", "nodes_set", "array") if getattr(args, name)]
    if given:
        raise UserError(f"submit chain: --{given[0].replace('_', '-')} belongs to a stage; "
                        f"write it into {argv[0]}")
    if args.scripts is not None and (args.dry_run or args.continue_chain):
        raise UserError(f"--scripts {args.scripts}: submits nothing; leave out --dry-run and --continue")
    options = chain.Options(args.cluster, args.account, args.partition, args.time)
    if args.scripts is None:
        return chain.run(argv[0], options, COMMANDS, resume=args.continue_chain, dry_run=args.dry_run)
    for script in write_scripts(argv[0], args.scripts, options, COMMANDS):
        print(script)
    return 0


def _cluster_name(args: argparse.Namespace) -> str:
    if args.cluster is None:
        raise UserError(f"--cluster: is missing; pass one of {', '.join(cluster.names())}, "
                        "or a YAML file of your own")
    return str(args.cluster)
