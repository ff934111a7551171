"""`megatron-sov rl reward ...`: the job that judges what lies in a rollout store."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, escape_controls, warn
from megatron_sov.base.settings import Flag, NotNegative, build_command, read_options
from megatron_sov.commands.score import REWARDS, JudgeOptions, RewardSet
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.reward import (
    ENVIRONMENT, NO_REWARD, JudgingJob, RewardSummary, resolve_reward_version, start_judge)
from megatron_sov.rollouts.prompts import parse_round_range
from megatron_sov.work.progress.locks import Claims
from megatron_sov.work.progress.progress_bar import create_bar

if TYPE_CHECKING:
    from megatron_sov.rollouts.store import RolloutStore


@dataclass(frozen=True, kw_only=True)
class JudgedOptions:
    """Where responses are, and what judges them."""

    store: Annotated[Path, Flag(value="DIR", writes=True)]
    """Rollout store: responses of `rl generate`, and their rewards."""
    reward: Annotated[str, Flag(value="NAME", help=f"{REWARDS}; {ENVIRONMENT}: what the "
                                                   "environment of the episodes said; or "
                                                   f"{NO_REWARD}: 0, where a teacher says enough")]
    reward_set: RewardSet = ()


@dataclass(frozen=True, kw_only=True)
class RewardOptions(JudgedOptions, JudgeOptions):
    """Judge the responses of a store with a reward."""

    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Rounds to judge (default: all that are in the store)."""
    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """How long to wait for more responses, each time that all are judged (default: not at all); ends with
    75 where the jobs that write have not come to their end by then, and with 0 as soon as --rounds are
    judged."""
    lease: Annotated[float, Ge(1), Lt(math.inf), Flag(value="SECONDS")] = RolloutConfig.lease_s
    """Without a sign of life after which another job's claim is taken over."""

def run_reward(args: argparse.Namespace) -> int:
    """Judge what is not judged.

    Raises:
        UserError: no such reward, setting or store.
        GateFailed: not one of the responses that were judged has a reward.
        StopRequested: the store that was waited for has not come.
    """
    options = read_options(RewardOptions, args)
    rounds = None if options.rounds is None else parse_round_range(options.rounds)
    # before the store is waited for: a wrong reward is told at once
    version = resolve_reward_version(options.reward, options.reward_set)
    store = opened_store(options.store, options.wait)
    with start_judge(options.reward, options.reward_set, options.workers) as judge:
        job = JudgingJob(store, Claims(store.claims, options.lease), version, judge, rounds,
                         {"reward": options.reward, "settings": list(options.reward_set)}, options.wait)
        with create_bar("judge", sum(part.num_rows for part in job.find_unjudged()), "response") as bar:
            job.progress = bar.update
            summary = job.run()
    return _tell_judged(options, version, summary)


def opened_store(path: Path, wait_s: float) -> RolloutStore:
    """Return a store, which is waited for: of jobs that begin together the one that writes makes it.

    Raises:
        UserError: there is none, or something else has its place.
        StopRequested: none has come.
    """
    from megatron_sov.rollouts.store import RolloutStore

    # jobs of a round begin together: whoever judges may come before whoever writes
    ends_s = time.monotonic() + wait_s
    while not path.exists() and time.monotonic() < ends_s:  # it appears by a rename
        time.sleep(min(1.0, wait_s))
    # without --wait `open` says that there is none: nobody was to make it meanwhile
    if wait_s and not path.exists():
        raise StopRequested(f"{path}: nobody has made this store within {wait_s:g} s; see whether "
                            "`rl generate` is at work, and give the same command again")
    return RolloutStore.open(path)


def _tell_judged(options: RewardOptions, version: str, summary: RewardSummary) -> int:
    tally = summary.tally
    for text in tally.told:
        print(escape_controls(text), file=sys.stderr)
    more = f"; {summary.unfinished:,} are unfinished and wait for their end" if summary.unfinished else ""
    print(f"{options.store}: {options.reward} {version}: {summary.parts:,} parts, "
          f"{tally.line('responses')}{more}")
    # one reward is enough: none at all is a wrong reward or broken judges
    if tally.statuses and not tally.num_rewards:
        raise GateFailed(f"{options.store}: not one of {tally.statuses.total():,} responses has a reward; "
                         "see why above")
    if summary.left:
        print(f"{summary.left:,} parts are with other jobs; give the same command again, or more patience "
              "with --wait", file=sys.stderr)
        return ExitCode.STOPPED
    if summary.waited_for:
        warn(f"{options.store}: nothing more has come for {options.wait:g} s, and {summary.waited_for} are "
             "not written: whoever trains waits for their rewards; give the same command again, or more "
             "patience with --wait")
        return ExitCode.STOPPED
    return ExitCode.OK


REWARD = build_command(RewardOptions, run_reward)
