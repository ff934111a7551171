"""Runs `megatron-sov rl reward`."""

import sys
import time
from pathlib import Path

from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, escape_controls, warn
from megatron_sov.commands.rl.store.reward import RewardOptions, RewardRequest
from megatron_sov.post.rl.reward import JudgingJob, RewardSummary, start_judge
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.work.progress.locks import Claims
from megatron_sov.work.progress.progress_bar import create_bar


def judge_store(request: RewardRequest) -> int:
    """Judge the responses that lack a reward with `request.version`."""
    options = request.options
    store = wait_for_store(options.store, options.wait)
    with start_judge(options.reward, options.reward_set, options.workers) as judge:
        job = JudgingJob(
            store=store, claims=Claims(store.claims, options.lease), version=request.version, judge=judge,
            rounds=request.rounds, wait_s=options.wait,
            provenance={"reward": options.reward, "settings": list(options.reward_set)})
        with create_bar("judge", sum(part.num_rows for part in job.find_unjudged()), "response") as bar:
            job.progress = bar.update
            summary = job.run()
    return _report_summary(options, request.version, summary)


def wait_for_store(path: Path, wait_s: float) -> RolloutStore:
    """Open a store; if it does not exist, wait up to `wait_s` seconds for the generating job."""
    # Jobs for a round start together, so this job may start before the store exists.
    ends_s = time.monotonic() + wait_s
    while not path.exists() and time.monotonic() < ends_s:  # a rename creates the store: it is complete
        time.sleep(min(1.0, wait_s))
    # Without --wait, `RolloutStore.open` reports the missing store.
    if wait_s and not path.exists():
        raise StopRequested(f"{path}: the store was not created within {wait_s:g} s; check that `rl "
                            "generate` is running, and repeat the command")
    return RolloutStore.open(path)


def _report_summary(options: RewardOptions, version: str, summary: RewardSummary) -> int:
    """Print the counts of a scoring job; return STOPPED while responses remain. Raises `GateFailed`."""
    tally = summary.tally
    for text in tally.examples:
        print(escape_controls(text), file=sys.stderr)
    more = f"; {summary.unfinished:,} are unfinished" if summary.unfinished else ""
    print(f"{options.store}: {options.reward} {version}: {summary.parts:,} parts, "
          f"{tally.format_counts('responses')}{more}")
    # Single responses may lack a reward; without a single reward, the judges are broken.
    if tally.statuses and not tally.num_rewards:
        raise GateFailed(f"{options.store}: none of {tally.statuses.total():,} responses has a reward; see "
                         "the reasons above")
    if summary.left:
        print(f"{summary.left:,} parts are claimed by other jobs; repeat the command, or raise "
              "--wait", file=sys.stderr)
        return ExitCode.STOPPED
    if summary.waited_for:
        warn(f"{options.store}: no new response for {options.wait:g} s, and {summary.waited_for} are not "
             "written; repeat the command, or raise --wait, because training waits for their rewards")
        return ExitCode.STOPPED
    return ExitCode.OK
