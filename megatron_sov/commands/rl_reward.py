"""`megatron-sov rl reward --store DIR --reward NAME`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.commands.rounds_option import add_rounds_argument, rounds_between
from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.documents.visible import visible
from megatron_sov.errors import ExitCode, GateFailed, StopRequested, UserError
from megatron_sov.obs.warning import warn
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.post.rl.reward import (
    ENVIRONMENT,
    JudgingJob,
    Summary,
    judging,
    reward_version,
    second_opinions,
)
from megatron_sov.rewards.registry import BUILT_IN
from megatron_sov.rewards.running import default_workers
from megatron_sov.rollouts.claims import Claims

if TYPE_CHECKING:
    from megatron_sov.rollouts.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="what `rl generate` writes")
    parser.add_argument("--reward", required=True, metavar="NAME",
                        help=f"{', '.join(BUILT_IN)}, or a class of your own, FILE.py:NAME; or "
                             f"{ENVIRONMENT}: what the environment of the episodes said")
    parser.add_argument("--reward-set", action="append", default=[], metavar="key=value",
                        help="a setting of the reward; may be repeated")
    add_rounds_argument(parser, "rounds to judge (default: all that are in the store)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS",
                        help="how long to wait for more responses, each time that all are judged (default: "
                             "not at all); ends with 75 where the jobs that write have not come to their end "
                             "by then, and with 0 as soon as --rounds are judged")
    parser.add_argument("--lease", type=float, default=RolloutConfig.lease_s, metavar="SECONDS",
                        help="without a sign of life after which another job's claim is taken over (default "
                             "%(default)g)")
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N",
                        help="processes that judge (default: one for each core)")


def run(args: argparse.Namespace) -> int:
    """Judge what is not judged.

    Raises:
        UserError: no such reward, setting or store.
        GateFailed: not one of the responses that were judged has a reward.
        StopRequested: the store that was waited for has not come.
    """
    rules = [(args.workers >= 1, f"--workers {args.workers}: must be at least 1"),
             (0 <= args.wait < float("inf"), f"--wait {args.wait}: must be a number that is not negative"),
             (1 <= args.lease < float("inf"), f"--lease {args.lease}: must be at least 1")]
    if problems := [said for holds, said in rules if not holds]:
        raise UserError(problems[0])
    rounds = None if args.rounds is None else rounds_between(args.rounds)
    version = reward_version(args.reward, args.reward_set)
    store = opened_store(args.store, args.wait)
    with judging(args.reward, args.reward_set, args.workers) as judge:
        job = JudgingJob(store, Claims(store.claims, args.lease), version, judge, rounds,
                         {"reward": args.reward, "settings": list(args.reward_set)}, args.wait,
                         opinions=second_opinions(args.reward, args.reward_set, version, store))
        with work_bar("judge", sum(part.num_rows for part in job.missing()), "response") as bar:
            job.progress = bar.update
            summary = job.run()
    return _tell(args, version, summary)


def opened_store(path: Path, wait_s: float) -> Store:
    """Return a store, which is waited for: of jobs that begin together the one that writes makes it.

    Raises:
        UserError: there is none, or something else has its place.
        StopRequested: none has come.
    """
    from megatron_sov.rollouts.store import Store

    ends_s = time.monotonic() + wait_s
    while not path.exists() and time.monotonic() < ends_s:  # it appears by a rename
        time.sleep(min(1.0, wait_s))
    if wait_s and not path.exists():
        raise StopRequested(f"{path}: nobody has made this store within {wait_s:g} s; see whether "
                            "`rl generate` is at work, and give the same command again")
    return Store.open(path)


def _tell(args: argparse.Namespace, version: str, summary: Summary) -> int:
    tally = summary.tally
    for text in tally.told:
        print(visible(text), file=sys.stderr)
    more = f"; {summary.unfinished:,} are unfinished and wait for their end" if summary.unfinished else ""
    print(f"{args.store}: {args.reward} {version}: {summary.parts:,} parts, "
          f"{tally.line('responses')}{more}")
    if tally.statuses and not tally.num_rewards:
        raise GateFailed(f"{args.store}: not one of {tally.statuses.total():,} responses has a reward; see "
                         "why above")
    if summary.left:
        print(f"{summary.left:,} parts are with other jobs; give the same command again, or more patience "
              "with --wait", file=sys.stderr)
        return ExitCode.STOPPED
    if summary.waited_for:
        warn(f"{args.store}: nothing more has come for {args.wait:g} s, and {summary.waited_for} are not "
             "written: whoever trains waits for their rewards; give the same command again, or more patience "
             "with --wait")
        return ExitCode.STOPPED
    return ExitCode.OK
