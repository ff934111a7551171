"""`megatron-sov score --reward NAME --input ROWS.jsonl --output OUT.jsonl`: answers to rewards."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import ExitCode, GateFailed, UserError, escape_controls
from megatron_sov.base.outputs import check_output, refuse_input_as_output
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, count_cores, parse_nested, read_options
from megatron_sov.commands.shared_options import RedoOptions
from megatron_sov.judge.rewards.registry import BUILT_IN, make, order
from megatron_sov.judge.rewards.scoring import ScoringSummary, score_file
from megatron_sov.work.progress.progress_bar import create_bar

REWARDS = f"{', '.join(BUILT_IN)}, or a class of your own, FILE.py:NAME"
RewardName = Annotated[str, Flag(value="NAME", help=REWARDS)]
RewardSet = Annotated[tuple[str, ...], Flag(value="key=value",
                                            help="A setting of the reward; may be repeated")]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How much is judged at a time."""

    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes that judge (default: one for each core)."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JudgeOptions, RedoOptions):
    """Give each row of a JSONL file a reward."""

    reward: RewardName
    input: Annotated[Path, Flag(value="ROWS.jsonl")]
    """A JSON object per line, with `response` and what the reward needs."""
    output: Annotated[Path, Flag(value="OUT.jsonl")]
    """The same rows with reward, status, components, reason, reward_version."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """A setting of the reward, e.g. max_length=4096; may be repeated."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the mean reward to the events of the run that wrote the responses, for its report."""


add_arguments = partial(add_options, cls=ScoreOptions)


def run(args: argparse.Namespace) -> int:
    """Score all rows; the output appears when all are there; the same command goes on behind a kill.

    Raises:
        UserError: no such reward or setting, bad rows, or nothing can be written there.
        GateFailed: all is written, and not one row has a reward.
    """
    options = read_options(ScoreOptions, args)
    from megatron_sov.runs.folder import EVENTS, RunEvents

    events = RunEvents(options.run)
    asked = order(options.reward, parse_nested(options.settings))
    made = make(asked)
    # before the first row: judging takes hours, and a missing folder is known now
    check_output("--output", options.output)
    if options.run is not None:
        refuse_input_as_output("--output", options.output, options.run / EVENTS)
    if options.output.exists() and options.input.exists() and options.output.samefile(options.input):
        raise UserError(f"--output {options.output}: is the --input; name another file")
    num_rows = check_rows(options.input)
    with create_bar("score", num_rows, "row") as bar:
        summary = score_file(asked, made, options.input, options.output, options.workers, bar.update,
                             redo=options.redo)
    tell(summary, num_rows, options.reward, made.version, options.output)
    if options.run is not None:
        events.add("score", step=events.last_step(), reward=asked.name, settings=dict(asked.settings),
                   reward_version=made.version, input=options.input.name, rows=num_rows,
                   questions=hash_questions(options.input), scored=summary.tally.num_rewards,
                   mean_reward=summary.tally.mean)
    # all rows are written first, with the reason of each in its row
    if not summary.tally.num_rewards:
        raise GateFailed(f"{options.output}: not one of its {num_rows:,} rows has a reward; see why "
                         "in their `reason`")
    return ExitCode.OK


def hash_questions(rows: Path) -> str:
    """Return the SHA-256 of what models were asked: means of one test alone can be compared."""
    found = hashlib.sha256()
    for _, row in read_rows(rows):
        asked = {name: row[name] for name in ("prompt", "messages") if name in row}
        found.update(json.dumps(asked or {**row, "response": None}, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def tell(summary: ScoringSummary, num_rows: int, name: str, version: str, output: Path) -> None:
    """Print the account of the input's rows, and why some have no reward."""
    if summary.num_kept:
        print(f"{summary.num_kept:,} rows were scored by an earlier command and are kept")
    for text in summary.tally.told:
        print(escape_controls(text), file=sys.stderr)
    tally = summary.tally
    others = {status: count for status, count in tally.statuses.items() if status != "scored"}
    account = RecordAccount(num_rows, tally.statuses["scored"], others, "rows", "scored")
    mean = "" if tally.mean is None else f"; mean reward {tally.mean:.4f}"
    print(f"{output}: {name} {version}: {account.describe()}{mean}")
