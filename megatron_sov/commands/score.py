"""`megatron-sov score`: scores the rows of a JSONL file with a reward, in several judge processes."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import GateFailed, UserError, escape_controls
from megatron_sov.base.outputs import refuse_input_as_output
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, count_cores, parse_nested
from megatron_sov.commands.shared_options import RedoOptions
from megatron_sov.judge.rewards.registry import BUILT_IN, build_versioned_reward, request_reward
from megatron_sov.judge.rewards.scoring import ScoringSummary, score_file
from megatron_sov.runs.folder import EVENTS, RunEvents
from megatron_sov.work.progress.progress_bar import create_bar

REWARDS = f"{', '.join(BUILT_IN)}, or your own class, FILE.py:NAME"
RewardName = Annotated[str, Flag(value="NAME", help=REWARDS)]
RewardSet = Annotated[tuple[str, ...], Flag(value="key=value", help="Reward setting; may be repeated")]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Judge processes."""

    workers: AtLeastOne = field(default_factory=count_cores)
    """Judge processes (default: one per core)."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JudgeOptions, RedoOptions):
    """Score the rows in a JSONL file with a reward."""

    reward: RewardName
    input: Annotated[Path, Flag(value="ROWS.jsonl")]
    """JSONL file with `response` and the fields that the reward needs."""
    output: Annotated[Path, Flag(value="OUT.jsonl")]
    """The same rows with reward, status, components, reason, reward_version."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Reward setting, e.g. max_length=4096; may be repeated."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also record the mean reward in DIR/events.jsonl; DIR is the run that generated the responses."""


def score_rows(options: ScoreOptions) -> None:
    """Score all rows and write the output at the end; a repeated command resumes after a kill. Raises
    `GateFailed`: no row has a reward; the output is complete."""
    events = RunEvents(options.run)
    reward_order = request_reward(options.reward, parse_nested(options.settings))
    reward = build_versioned_reward(reward_order)
    if options.run is not None:
        refuse_input_as_output("--output", options.output, options.run / EVENTS)
    if options.output.exists() and options.input.exists() and options.output.samefile(options.input):
        raise UserError(f"--output {options.output}: is the --input; name another file")
    num_rows = check_rows(options.input)
    with create_bar("score", num_rows, "row") as bar:
        summary = score_file(reward_order, reward, source=options.input, output=options.output,
                             workers=options.workers, progress=bar.update, redo=options.redo)
    print_summary(summary, num_rows, options.reward, reward.version, options.output)
    if options.run is not None:
        events.add("score", step=events.last_step(), reward=reward_order.name,
                   settings=dict(reward_order.settings), reward_version=reward.version,
                   input=options.input.name, rows=num_rows, questions=hash_questions(options.input),
                   scored=summary.tally.num_rewards,
                   mean_reward=summary.tally.mean)
    if not summary.tally.num_rewards:
        raise GateFailed(f"{options.output}: none of its {num_rows:,} rows has a reward; see their `reason`")


SCORE = DeclaredCommand(ScoreOptions, score_rows)


def hash_questions(rows: Path) -> str:
    """Return the SHA-256 of the prompts: mean rewards are comparable only for equal prompts."""
    digest = hashlib.sha256()
    for _, row in read_rows(rows):
        question = {name: row[name] for name in ("prompt", "messages") if name in row}
        if not question:  # neither prompt nor messages: all fields but the response
            question = {**row, "response": None}
        digest.update(json.dumps(question, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def print_summary(summary: ScoringSummary, num_rows: int, name: str, version: str, output: Path) -> None:
    """Print the counts of scored and unscored rows, with reasons and the mean reward."""
    if summary.num_kept:
        print(f"{summary.num_kept:,} rows were already scored")
    for message in summary.tally.examples:
        print(escape_controls(message), file=sys.stderr)
    tally = summary.tally
    unscored = {status: count for status, count in tally.statuses.items() if status != "scored"}
    account = RecordAccount(num_rows, tally.statuses["scored"], unscored, "rows", "scored")
    mean = "" if tally.mean is None else f"; mean reward {tally.mean:.4f}"
    print(f"{output}: {name} {version}: {account.describe()}{mean}")
