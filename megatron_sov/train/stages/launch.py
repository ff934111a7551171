"""Running a training stage: checks of folder, data and start, then the ranks."""

import os
import shlex
import sys
import time
from functools import partial
from typing import Any

from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, UserError, warn
from megatron_sov.chat.vocabulary import check_same_tokens, read_tokenizer
from megatron_sov.engine.parallel import launcher
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import STAGES, RunEvents, RunFolder
from megatron_sov.runs.launch_environment import get_command_start, has_launcher, is_first_rank, num_ranks
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.train.data.ledger import check_pairs_fit, check_units_fit, count_over_long, plan_ledger
from megatron_sov.train.data.requirements import check_columns, check_routes_and_encoders
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.train.data.views import add_source_views
from megatron_sov.train.guards.fault_injection import list_pending_faults
from megatron_sov.train.objectives.objective import get_columns, get_formats
from megatron_sov.train.side_jobs.evaluations import check_eval_tasks
from megatron_sov.train.side_jobs.side_jobs import SideJobs
from megatron_sov.train.stages.announcement import format_banner, format_next_commands
from megatron_sov.train.stages.rank import run_rank
from megatron_sov.train.stages.shared_copies import SHARED, find_copy
from megatron_sov.train.stages.stage import LaunchState, Stage, StageData


def run_stage(stage: Stage, nproc: int | None, start_s: float | None = None) -> bool:
    """Run a stage with `nproc` local processes, and return True if it is complete or `stage.dry_run` is set.

    `start_s` is the Unix time at which work on the stage began; default: the start of the command.

    Raises `UserError` before any change if settings, data or folder do not allow the stage, and, with
    everything saved, `StopRequested` after a stop request and `GateFailed` if the gate did not pass. Under
    torchrun or Slurm it returns False in these two cases, so that the ranks exit normally.
    """
    launch = LaunchState(get_command_start() if start_s is None else start_s, stage.resume)
    stage.config.check(num_ranks(nproc))
    models.get_family(stage.config.model.family).check(stage.config.model)
    # torchrun restarts a run by repeating the command, without --resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    launch.may_resume = launch.may_resume or restarted
    stage.folder.enter(stage.config, launch.may_resume)
    completion = stage.folder.completion()
    if completion is not None:
        report_completion(stage.folder, stage.config, completion, dry_run=stage.dry_run)
        return True
    data = _open_data(stage)
    _check_start(stage, data)
    if stage.dry_run:
        _print_plan(stage, data, num_ranks(nproc))
        return True
    if stage.notes and is_first_rank():
        print(_format_defaults(stage), file=sys.stderr, flush=True)
    stage.folder.clear_gate_failure()
    restarts = launcher.RestartPolicy(
        stage.config.train.max_restarts, lambda: checkpoints.latest_checkpoint(stage.folder.checkpoints),
        partial(_record_restart, stage.folder, launch), partial(_record_failure, stage))
    try:
        code = launcher.launch_ranks(partial(run_rank, stage, data, launch), nproc,
                                     stage.config.train.num_threads, restarts)
    except KeyboardInterrupt:  # the second Ctrl-C; nothing can be resumed before the folder contains the run
        if not launch.declared[0]:
            raise
        raise StopRequested(f"left at once; {_format_resume_hint(stage.folder)}") from None
    return _conclude_stage(stage, launch, code)


def _conclude_stage(stage: Stage, launch: LaunchState, code: int) -> bool:
    """Finish the side jobs of a complete stage; return and raise as `run_stage`. `code` is the exit code of
    the ranks."""
    if code != 0:
        # a folder that these ranks did not declare belongs to an earlier run
        if code == ExitCode.USER_ERROR and launch.declared[0] and not launch.may_resume:
            stage.folder.remove_unstarted()
        raise SystemExit(code)  # the failed rank has printed the reason
    if stage.folder.completion() is not None:
        for fault in list_pending_faults(stage.faults, stage.folder.path):
            warn(f"--inject {fault.name}: never happened")
        _finish_side_jobs(stage.folder, stage.config)
        return True
    failure = stage.folder.failure()
    if has_launcher():
        if failure is not None and is_first_rank():
            print(f"gate: {stage.folder.path}: {failure}", file=sys.stderr, flush=True)
        return False
    if failure is not None:
        raise GateFailed(f"{stage.folder.path}: {failure}")
    raise StopRequested(f"everything is saved; {_format_resume_hint(stage.folder)}")


def _format_resume_hint(folder: RunFolder) -> str:
    """Return the last checkpoint's step and the command that continues the run."""
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    step = "no checkpoint yet"
    if newest is not None:
        step = f"last checkpoint: step {checkpoints.checkpoint_step(newest)}"
    # a stage of an extension continues with the whole run
    run = folder.path.parents[1] if folder.path.parent.name == STAGES else folder.path
    return f"{step}; continue with: megatron-sov resume {shlex.quote(str(run))}"


def report_completion(folder: RunFolder, config: RunConfig, completion: dict[str, Any], *,
                      dry_run: bool) -> None:
    """Print that a run is complete, and finish its side jobs unless in a dry run."""
    if is_first_rank():
        print(f"{folder.path}: is complete at step {completion['step']}; more steps need a new --run --from "
              f"it\n{format_next_commands(folder.path, config)}")
    if not dry_run:
        _finish_side_jobs(folder, config)


def _print_plan(stage: Stage, data: StageData, num_processes: int) -> None:
    """Print a dry run's result."""
    if not is_first_rank():
        return
    newest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    steps = range(checkpoints.checkpoint_step(newest) if newest else 0, stage.config.num_steps())
    if stage.notes:
        print(_format_defaults(stage))
    print(format_banner(stage.config, num_processes, run=stage.folder.path, steps=steps, entries=data.planned,
                        sources=data.sources, memory=stage.memory))
    start = newest or stage.start_from or f"initial weights, train.seed = {stage.config.train.seed}"
    print(f"  start      {start}")
    hf_folder, run = stage.start_from, stage.folder.path
    if hf_folder is not None and is_hf_folder(hf_folder) and find_copy(hf_folder, run) is None:
        print(f"  converts   {hf_folder} into {run.parent / SHARED} first")
    print("dry run: nothing was written, and nothing ran")


def _format_defaults(stage: Stage) -> str:
    return f"defaults: {', '.join(stage.notes)}"


def _check_start(stage: Stage, data: StageData) -> None:
    """Raise `UserError` if the start does not fit data or settings, or lies after `--until`."""
    newest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    if stage.until is not None and newest is not None and checkpoints.checkpoint_step(newest) >= stage.until:
        raise UserError(f"--until {stage.until}: the run is at step {checkpoints.checkpoint_step(newest)} "
                        "already; name a later step")
    if (start := newest or stage.start_from) is not None:
        check_same_tokens(tokenizer_folder(data.sources), checkpoints.find_tokenizer_folder(start))
    elif stage.config.lora.on:
        raise UserError(f"lora.rank = {stage.config.lora.rank}: adapters need a trained base model; add "
                        "--from")


def _open_data(stage: Stage) -> StageData:
    packed = stage.sources
    if packed is None:
        packed = tuple(open_sources(stage.config.data.paths, stage.config.model.vocab_size,
                                    get_formats(stage.objective)))
    check_eval_tasks(stage.config, packed)
    chats = [s.name for s in packed if s.is_chat]
    if chats and stage.config.objective.name == "lm" and is_first_rank():
        warn(f"{', '.join(chats)}: holds conversations, and only answers are learned; use "
             "`megatron-sov sft` for conversations")
    tokenizer = tokenizer_folder(list(packed))
    if tokenizer is not None:
        read_tokenizer(tokenizer)  # damage would otherwise show only at the first evaluation
    for source in packed:
        if source.num_tokens.get("heldout"):
            source.open_split("heldout")
    sources = [*add_source_views(stage.config, list(packed)), *stage.extra_sources]
    check_columns(sources, get_columns(stage.objective))
    check_routes_and_encoders(sources, stage.config.model)
    planned = plan_ledger(stage.config, sources)
    if stage.config.data.over_long == "refuse":
        check_units_fit(count_over_long(sources, planned))
    elif stage.config.data.over_long == "cut":
        check_pairs_fit(count_over_long([s for s in sources if s.group > 1], planned))
    return StageData(sources, planned)


def _finish_side_jobs(folder: RunFolder, config: RunConfig) -> None:
    """Finish exports and their evaluations on rank 0, after collectives have ended."""
    if is_first_rank():
        SideJobs(folder.path, config, RunEvents(folder.path).add).wait()


def _record_restart(folder: RunFolder, launch: LaunchState, code: int, cause: str) -> None:
    """Record that the ranks start again; called while no rank has the records open."""
    launch.time_s, launch.may_resume = time.time(), True
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    text = f"{cause}; all processes are started again, from {newest.name if newest else 'the beginning'}"
    warn(text)
    event = {"step": checkpoints.checkpoint_step(newest) if newest else 0, "exit_code": code, "text": text}
    if not (folder.path / EVENTS).is_file():  # the ranks ended before the run had begun
        launch.restarts.append(event)
        return
    launch.restarts.clear()
    RunEvents(folder.path).add("restart", **event)


def _record_failure(stage: Stage, code: int, cause: str) -> None:
    """Record that the ranks do not start again."""
    limit, newest = stage.config.train.max_restarts, checkpoints.latest_checkpoint(stage.folder.checkpoints)
    reason = "starts in a row have left no new checkpoint" if limit else "lets no process start again"
    text = (f"{cause}, and train.max_restarts = {limit} {reason}; find the cause above, and go on with "
            "--resume")
    print(f"error: {text}", file=sys.stderr, flush=True)
    if (stage.folder.path / EVENTS).is_file():
        RunEvents(stage.folder.path).add(
            "failure", step=checkpoints.checkpoint_step(newest) if newest else 0, exit_code=code, text=text)
