"""`megatron-sov ssp probe | fuse`: pass@k of many checkpoints in many domains, and their experts as one.

A checkpoint is asked by one `eval passk` over all domains' problems, so its weights are loaded once, and a
user can give these commands one by one, on other machines too: --dry-run prints them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import MANIFEST, find_damaged_files, read_manifest, translate_disk_errors
from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.rows import check_rows
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.hints.lines import is_check
from megatron_sov.base.settings import (
    AtLeastOne, Flag, at_most_field, build_command, parse_nested, read_options)
from megatron_sov.commands.evaluate.eval_passk import PROMPT, EvalPasskOptions, JudgedSamplingOptions
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions, list_option_words
from megatron_sov.infer.request import RankOptions
from megatron_sov.judge.rewards.registry import make, order
from megatron_sov.model.config import split_weight
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import has_launcher
from megatron_sov.runs.rounds import record_or_check_settings
from megatron_sov.work.processes.children import run_command
from megatron_sov.work.progress.progress_bar import create_bar

if TYPE_CHECKING:
    from megatron_sov.post.ssp import ProbedCheckpoint


PROBING_SETS = "probing_sets"
"""Kind of the artifact that `sov-data probing-sets` writes."""


@dataclass(frozen=True, kw_only=True)
class SspProbeOptions(JudgedSamplingOptions, RankOptions):
    """pass@k of a run's checkpoints in each domain, and the best one of each."""

    checkpoints: Annotated[tuple[Path, ...], Flag("RUN|CHECKPOINT")]
    """Checkpoints or Hugging Face folders; of a run all complete checkpoints."""
    problem_sets: Annotated[tuple[str, ...], Flag("--problems", "DOMAIN=FILE.jsonl|DIR", many=True)]
    """Problems of each domain: a JSON object per line, with `prompt` and what the reward needs; or sets of
    `sov-data probing-sets`."""
    k: Annotated[AtLeastOne, Flag(value="K"), at_most_field("samples")]
    """The best checkpoint of a domain is that of the greatest pass@K."""
    output: Annotated[Path, Flag(value="DIR")]
    """The probe's folder; the same command goes on in it, and adds checkpoints to it."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the table to this run's events, for its report."""
    dry_run: bool = False
    """Print the command for each checkpoint that is not probed yet, and start none."""

def run_probe(typed: argparse.Namespace) -> int:
    """Probe what is not probed yet and write the table; returns 0, or the exit code of a command that did not
    end well.

    Raises:
        UserError: a mistake in the arguments, or the folder holds a probe that was asked for otherwise.
    """
    args = read_options(SspProbeOptions, typed)
    events, domains = RunEvents(args.run), _checked(args)
    from megatron_sov.post import ssp

    candidates = ssp.find_candidates(args.checkpoints)
    # a proposed line leaves nothing, while --dry-run writes the problems that its commands read
    if is_check():
        return ExitCode.OK
    record_or_check_settings(args.output, args.output / ssp.CONDITIONS, _asked(args, domains), "--output",
                             "answers", {args.output / ssp.PROBLEMS})
    # also those of earlier commands in this folder: the table is of all
    known = ssp.read_candidates(args.output, candidates)
    with translate_disk_errors(args.output):
        problems = ssp.write_problems(args.output, domains)
    missing = [c for c in known if not c.is_done(args.output)]
    # all commands are made before the first starts, so a mistake in the last is told now
    commands = [_words(args, candidate, problems) for candidate in missing]
    if args.dry_run:
        for words in commands:
            print(shlex.join(["megatron-sov", *words]))
        return ExitCode.OK
    if commands and has_launcher():
        raise UserError("ssp probe: starts a process of its own for each checkpoint; under torchrun or Slurm "
                        "give the commands that --dry-run prints, then this one alone")
    for number, (candidate, words) in enumerate(zip(missing, commands, strict=True), 1):
        print(f"checkpoint {number} of {len(missing)}: {candidate.name}", file=sys.stderr, flush=True)
        if (code := run_command(["megatron_sov", *words], "the same command goes on")) != ExitCode.OK:
            return code
    with create_bar("estimate", len(known), "checkpoint") as bar:
        content = ssp.write_table(args.output, known, args.k, args.right_from)
        bar.update(len(known))
    events.add("ssp_probe", step=events.last_step(), output=str(args.output), reward=args.reward,
               samples=args.samples, **content)
    print(ssp.format_table(content))
    return ExitCode.OK


def _checked(args: SspProbeOptions) -> dict[str, Path]:
    """Return domain -> its problems, after everything that can be checked before the first command."""
    domains: dict[str, Path] = {}
    for given in args.problem_sets:
        domain, equals, name = given.partition("=")
        if not equals and Path(given).is_dir():
            found = _frozen(Path(given))
        elif domain and equals and name:
            found = {domain: Path(name)}
        else:
            raise UserError(f"--problems {given}: must be DOMAIN=FILE.jsonl, e.g. algebra=algebra.jsonl, or "
                            "a folder of `sov-data probing-sets`")
        for name in found:
            if name in domains:
                raise UserError(f"--problems {given}: domain {name} has {domains[name]} already; put its "
                                "problems into one file")
        domains |= found
    make(order(args.reward, parse_nested(args.reward_set, "--reward-set")))
    for path in args.checkpoints:
        check_model_path(path)
    for file in domains.values():
        check_rows(file, "--problems", PROMPT)
    return domains


def _frozen(folder: Path) -> dict[str, Path]:
    """Return domain -> problems of sets that are as they were frozen."""
    content = read_manifest(folder, PROBING_SETS).content
    if damage := find_damaged_files(folder):
        raise UserError(f"--problems {folder}: {damage[0]}; these are not the problems that were frozen")
    return {str(domain): folder / f"{domain}.jsonl" for domain in content.get("domains", {})}


def _asked(args: SspProbeOptions, domains: dict[str, Path]) -> dict[str, Any]:
    """Return what is the same for every checkpoint, or their figures could not be compared."""
    version = make(order(args.reward, parse_nested(args.reward_set, "--reward-set"))).version
    # digests: a file of problems that changed would make figures that cannot be compared
    return {"problems": {domain: hash_file(file) for domain, file in domains.items()}, "k": args.k,
            "reward_version": version,
            **{name: getattr(args, name) for name in (
                "reward", "reward_set", "right_from", "samples", "stop", "chat")},
            **{name: getattr(args.sampling, name) for name in (
                "temperature", "top_k", "top_p", "seed", "max_new_tokens")}}


def _words(args: SspProbeOptions, candidate: ProbedCheckpoint, problems: Path) -> list[str]:
    """Return the command that has a checkpoint answer and the answers judged."""
    folder = candidate.folder(args.output)
    same = {field.name: getattr(args, field.name) for cls in (JudgedSamplingOptions, RankOptions)
            for field in fields(cls)}
    return ["eval", "passk", *list_option_words(EvalPasskOptions(
        **same, target=candidate.path, input=problems, k=tuple(sorted({1, args.k})), output=folder,
        overwrite=folder.exists()))]  # what is there is of files that have changed since


PROBE = build_command(SspProbeOptions, run_probe)


@dataclass(frozen=True, kw_only=True)
class SspFuseOptions(PluginOptions, OverwriteOptions, RedoOptions):
    """Merge the best checkpoint of each domain, or any checkpoints, into one."""

    checkpoints: Annotated[tuple[str, ...], Flag("PROBE_DIR|CHECKPOINT[:weight]")]
    """The folder of a probe, whose best checkpoint of each domain counts once for each, or checkpoints (a
    run: its newest one) with weights, 1 each unless given."""
    output: Annotated[Path, Flag(value="CHECKPOINT")]
    """Checkpoint to write: the mean of all weights, in float64."""
    workers: AtLeastOne = 1
    """Files at a time, each with two tensors in memory."""

def run_fuse(typed: argparse.Namespace) -> int:
    """Merge, and print what was merged.

    Raises:
        UserError: the checkpoints have no mean, or nothing can be written there.
    """
    args = read_options(SspFuseOptions, typed)
    load_plugins(args.plugins)
    from megatron_sov.post.ssp import TABLE, read_experts

    first, fewest = Path(args.checkpoints[0]), 2
    # a probe says by itself which checkpoints are experts and how often each counts
    if (first / TABLE / MANIFEST).is_file():
        if len(args.checkpoints) > 1:
            raise UserError(f"{first}: is a probe, whose experts are merged by themselves; leave out "
                            f"{args.checkpoints[1]}")
        # one may be the best in every domain: whatever a probe finds, the next stage has its start
        found, fewest = read_experts(first), 1
    else:
        found = [(Path(path), weight) for path, weight in (split_weight(c, c) for c in args.checkpoints)]
    from megatron_sov import convert

    convert.average(found, args.output, workers=args.workers, overwrite=args.overwrite, redo=args.redo,
                    min_checkpoints=fewest)
    total = sum(weight for _, weight in found)
    for path, weight in found:
        print(f"{weight / total:.4g} of {path}")
    print(f"wrote checkpoint {args.output}")
    return ExitCode.OK


FUSE = build_command(SspFuseOptions, run_fuse)
