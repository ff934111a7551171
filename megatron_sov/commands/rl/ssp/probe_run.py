"""Runs `megatron-sov ssp probe`: an `eval passk` over all problems per checkpoint, then the table.

Each checkpoint has a process of its own, so its weights are loaded once, and other machines may run the
commands that --dry-run prints.
"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import parse_nested
from megatron_sov.commands.evaluate.eval_passk import EvalPasskOptions, JudgedSamplingOptions
from megatron_sov.commands.rl.ssp.probe import ProbeRequest, SspProbeOptions
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.infer.request import RankOptions
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.post.ssp import (
    CONDITIONS, PROBLEMS, ProbedCheckpoint, find_candidates, format_table, read_candidates, write_problems,
    write_table)
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import has_launcher
from megatron_sov.runs.rounds import record_or_check_settings
from megatron_sov.work.processes.children import run_command
from megatron_sov.work.progress.progress_bar import create_bar


def probe_checkpoints(request: ProbeRequest) -> int:
    """Evaluate the checkpoints without results, write the table, and return the exit code."""
    options = request.options
    events, candidates = RunEvents(options.run), find_candidates(options.checkpoints)
    record_or_check_settings(options.output, options.output / CONDITIONS, _describe_conditions(request),
                             option="--output", noun="answers", rewritten_files={options.output / PROBLEMS})
    # The table also contains checkpoints from earlier commands in the folder.
    checkpoints = read_candidates(options.output, candidates)
    with translate_disk_errors(options.output):
        problems = write_problems(options.output, request.problems)
    missing = [checkpoint for checkpoint in checkpoints if not checkpoint.is_done(options.output)]
    # Build every command before the first starts, so that mistakes in the last command show now.
    commands = [_build_command(options, checkpoint, problems) for checkpoint in missing]
    if options.dry_run:
        for words in commands:
            print(shlex.join(["megatron-sov", *words]))
        return ExitCode.OK
    if commands and has_launcher():
        raise UserError("ssp probe: starts a process per checkpoint; under torchrun or Slurm run the "
                        "commands from --dry-run, then this command in one process")
    for number, (checkpoint, words) in enumerate(zip(missing, commands, strict=True), 1):
        print(f"checkpoint {number} of {len(missing)}: {checkpoint.name}", file=sys.stderr, flush=True)
        if (code := run_command(["megatron_sov", *words], "the same command continues")) != ExitCode.OK:
            return code
    with create_bar("estimate", len(checkpoints), "checkpoint") as bar:
        content = write_table(options.output, checkpoints, options.k, options.right_from)
        bar.update(len(checkpoints))
    events.add("ssp_probe", step=events.last_step(), output=str(options.output), reward=options.reward,
               samples=options.samples, **content)
    print(format_table(content))
    return ExitCode.OK


def _describe_conditions(request: ProbeRequest) -> dict[str, Any]:
    """Return problems, reward and sampling, which are equal for all checkpoints."""
    options, sampling = request.options, request.options.sampling
    version = build_versioned_reward(request_reward(options.reward,
                                                    parse_nested(options.reward_set, "--reward-set"))).version
    # Digests of the files: results for changed problems cannot be compared.
    digests = {domain: hash_file(file) for domain, file in request.problems.items()}
    conditions: dict[str, Any] = {"problems": digests, "k": options.k, "reward_version": version}
    for name in ("reward", "reward_set", "right_from", "samples", "stop", "chat"):
        conditions[name] = getattr(options, name)
    for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens"):
        conditions[name] = getattr(sampling, name)
    return conditions


def _build_command(options: SspProbeOptions, checkpoint: ProbedCheckpoint, problems: Path) -> list[str]:
    """Return the words of the `eval passk` command for a checkpoint."""
    shared = {field.name: getattr(options, field.name) for cls in (JudgedSamplingOptions, RankOptions)
              for field in fields(cls)}
    folder = checkpoint.folder(options.output)
    passk = EvalPasskOptions(**shared, target=checkpoint.path, input=problems,
                             k=tuple(sorted({1, options.k})), output=folder,
                             overwrite=folder.exists())  # results from changed files
    return ["eval", "passk", *list_option_words(passk)]
