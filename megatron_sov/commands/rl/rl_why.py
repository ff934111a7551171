"""`megatron-sov rl why RUN STEP`: what an optimizer step has learned from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import ExitCode, UserError, visible
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.train.resume import typed_options
from megatron_sov.runs.folder import read_command

if TYPE_CHECKING:
    from megatron_sov.post.rl.why import ExplainedStep, LearnedResponse

LONGEST_TEXT = 300
"""Characters of a response that are printed."""


@dataclass(frozen=True, kw_only=True)
class WhyOptions:
    """Tell what a step of reinforcement learning has learned from: its responses, their rewards and
    advantages, who wrote and judged them, and how large a part of the step each was."""

    run: Annotated[Path, Flag("RUN")]
    """Run of `rl run` or `rl train`."""
    step: Annotated[AtLeastOne, Flag("STEP")]
    """Optimizer step, from 1."""
    store: Annotated[Path | None, Flag(value="DIR")] = None
    """Its rollout store (default: that of the run's command)."""
    count: AtLeastOne = 10
    """Responses to print, those of the largest part first."""
    json: bool = False
    """Print JSON, with all responses."""


add_arguments = partial(add_options, cls=WhyOptions)


def run(args: argparse.Namespace) -> int:
    """Print the step.

    Raises:
        UserError: it is no such run or step, or the store has other responses.
    """
    from megatron_sov.post.rl.why import explain

    options = read_options(WhyOptions, args)
    found = explain(options.run, options.step, options.store or _store_of(options.run))
    if options.json:
        print(json.dumps(asdict(found)))
        return ExitCode.OK
    for line in _lines(found, options.count):
        print(visible(line).replace("\n", "\\n"))
    return ExitCode.OK


def _store_of(run_folder: Path) -> Path:
    began = read_command(run_folder)
    store = getattr(typed_options(began)[2], "store", None)
    if store is None:
        raise UserError(f"{run_folder}: its command names no --store; name it with --store")
    return began.folder / Path(store)


def _lines(found: ExplainedStep, count: int) -> Iterator[str]:
    from megatron_sov.post.rl.gathering import describe_groups

    yield (f"step {found.step}: round {found.round}, its step {found.step_of_round}; "
           f"{len(found.responses):,} responses; groups of the round: {describe_groups(found.groups)}")
    yield (f"judged by reward version {found.reward_version}; begun by the weights "
           f"{', '.join(digest[:12] for digest in found.policies) or '(none)'}")
    if not found.recorded:
        yield "the run has not learned it yet, or has taken it back"
    elif found.loss_at_start is not None:
        yield (f"policy loss {found.recorded.get('losses', {}).get('policy')}; where no ratio has moved "
               f"{found.loss_at_start:.6g}")
    if found.no_shares:
        yield f"no shares: {found.no_shares}"
    for response in found.responses[:count]:
        yield from _told(response)
    if len(found.responses) > count:
        yield f"and {len(found.responses) - count:,} more (--count, --json)"


def _told(found: LearnedResponse) -> Iterator[str]:
    share = "" if found.share is None else f"{found.share:+.2%} of the step, "
    advantage = "" if found.advantage is None else f"advantage {found.advantage:+.4g}, "
    group = ", ".join(f"{value:.4g}" for value in found.group_rewards)
    reward = "no reward" if found.reward is None else f"reward {found.reward:.4g} of a group of {group}"
    writers = " to ".join(map(str, sorted(set(found.versions))))
    yield f"{share}{advantage}{reward}; {found.num_tokens:,} tokens by the weights of step {writers}"
    components = "".join(f", {name} {value:.4g}" for name, value in found.components.items())
    yield (f"  {found.part} {found.row}{f', {found.domain}' if found.domain else ''}{components}: "
           f"{json.dumps(found.response[:LONGEST_TEXT], ensure_ascii=False)}")
