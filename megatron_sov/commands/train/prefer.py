"""`megatron-sov prefer RECIPE --from CHECKPOINT --data PAIRS[:weight] ... --run DIR --method dpo`, and with
--rounds N: a door to rounds of `rl run`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Flag, ProblemCode, SettingsProblem, add_options, only_with, read_options)
from megatron_sov.commands.rl.rounds import RlRunOptions, run_as_rl
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE, PreferenceMethod
from megatron_sov.model.objectives import factory
from megatron_sov.runs.checkpoints import find_checkpoint, refuse_missing
from megatron_sov.train.stages.stage_config import ParsedStage, parse_stage

if TYPE_CHECKING:
    from megatron_sov.post.reference import Reference
    from megatron_sov.train.data.token_shards import Source
    from megatron_sov.train.stages.gate import GateView


NEEDED = ("prompts", "reward")
STORE = "store"
"""Folder of --run: rollout store of its rounds."""
STEPS_PER_ROUND = 4
"""Of --rounds: with one alone each pair would be compared with the very model that learns it."""


@dataclass(frozen=True, kw_only=True)
class PreferOptions(TunedOptions):
    """Learn from preferences, of pairs that there are, or in rounds of answers that are judged on the way."""

    groups: ClassVar[tuple[str, ...]] = ("preference",)

    method: PreferenceMethod | None = None
    """The loss (--set preference.method=...; default dpo)."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Compare with this model (dpo, ipo, dpo-norm, kto; default: the one of --from)."""
    rounds: AtLeastOne | None = None
    """N times: answer --prompts, judge by --reward, learn from it, in one run."""
    # a door to `rl run` with policy.method=preference
    prompts: Annotated[Path | None, Flag(value="FILE|DIR"), only_with("rounds")] = None
    """--rounds: rows with `prompt` or `messages` and what the reward needs, as of `rl run`."""
    reward: Annotated[str | None, Flag(value="NAME"), only_with("rounds")] = None
    """--rounds: as of `megatron-sov score`."""
    reward_set: Annotated[tuple[str, ...], Flag(value="key=value")] = ()
    """--rounds: a setting of the reward; may be repeated."""
    samples: Annotated[int, Ge(2)] = 8
    """--rounds: answers to each prompt, which are compared."""
    temperature: Annotated[AboveZero, Flag(value="T")] = 1.0
    """--rounds: of these samples."""
    max_new_tokens: AtLeastOne = 512
    """--rounds: longest answer."""
    keep_unfinished: Annotated[bool, only_with("rounds")] = False
    """--rounds: learn an answer that --max-new-tokens cut off as a good one too, as `sov-data pairs`
    may."""

    def problems(self) -> list[SettingsProblem]:
        """Return what rounds need."""
        return [SettingsProblem(ProblemCode.RULE, "rounds", f"needs --{name}; add it", self.rounds)
                for name in NEEDED if self.rounds and getattr(self, name) is None]


def rl_options(args: PreferOptions) -> RlRunOptions:
    """Return what `rl run` is asked for by --rounds.

    Raises:
        UserError: an option is given that rounds do not take.
    """
    assert args.reward is not None and args.prompts is not None, "options are checked"
    if args.data:
        raise UserError(f"--data {args.data[0]}: rounds learn from the model's own responses alone, and take "
                        "no pairs beside them; learn your pairs first, by `prefer` without --rounds, and "
                        "begin the rounds --from that run")
    if args.reference is not None:
        raise UserError(f"--reference {args.reference}: rounds compare with the model that begins each, or "
                        "with that of --from by --set policy.reference=run; leave it out")
    settings = ("objective.name=policy", "policy.method=preference",
                f"policy.keep_unfinished={json.dumps(args.keep_unfinished)}", f"rollout.rounds={args.rounds}",
                f"rollout.steps_per_round={STEPS_PER_ROUND}", f"rollout.samples_per_prompt={args.samples}",
                f"rollout.temperature={args.temperature}", f"rollout.max_new_tokens={args.max_new_tokens}")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TunedOptions)}
    # what is typed goes before
    return RlRunOptions(**given | {"settings": (*settings, *args.settings)}, prompts=args.prompts,
                        reward=args.reward, reward_set=args.reward_set, store=args.run / STORE)


add_arguments = partial(add_options, cls=PreferOptions)


def run(typed: argparse.Namespace) -> int:
    """Learn from preferences; returns 0 when the run is complete."""
    args = read_options(PreferOptions, typed)
    if args.method is not None:
        settings = (*args.settings, f"preference.method={args.method}")
        args = dataclasses.replace(args, settings=settings)
    if args.rounds is not None:
        return run_as_rl(rl_options(args), typed.began_s)
    if is_complete(args, "preference"):
        return 0
    parsed = parse_stage(args, "preference")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    gate = gate_of(args, parsed.config, parsed.start)
    # looked up before Megatron is imported
    fixed = _fixed_reference(args.reference, parsed.config)

    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
    from megatron_sov.train.data.token_shards import as_input, open_sources

    prepare_megatron()
    from megatron_sov.post.preference import HELDOUT_PAIRS, measure_heldout_pairs, objective_of
    from megatron_sov.post.reference import COLUMN
    from megatron_sov.runs.folder import REFERENCE, RunFolder
    from megatron_sov.train.objectives.objective import columns_of, formats_of
    from megatron_sov.train.stages.stage import Stage, run_stage

    config = parsed.config
    objective = factory(config, objective_of(config))
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, formats_of(objective)))
    needed = columns_of(objective)
    if DESIRABLE not in needed:
        _refuse_other_judgements(config, sources)
    # single judged responses (kto) have no pairs that could be ranked
    pairs = [s for s in sources if s.format == "preference" and DESIRABLE not in needed]
    reference = _reference(args, parsed, sources, pairs, fixed) if COLUMN in needed else None
    reference_of = None if reference is None else reference.heldout_logprobs

    def before(view: GateView) -> None:
        if reference is not None:
            reference.make(view)
        measure_heldout_pairs(view, pairs, reference_of)

    def after(view: GateView) -> dict[str, Any]:
        return {HELDOUT_PAIRS: measure_heldout_pairs(view, pairs, reference_of)}

    run_stage(Stage(config, RunFolder(args.run), objective, parsed.start, args.resume,
                    sources if reference is None else reference.sources, before=before, after=after,
                    end_gate=gate, faults=parsed.faults, until=args.until, dry_run=args.dry_run,
                    notes=parsed.notes, besides=() if fixed is None else (as_input(REFERENCE, fixed),)),
              args.nproc, typed.began_s)
    return 0


def _refuse_other_judgements(config: RunConfig, sources: Sequence[Source]) -> None:
    """Raise `UserError` where pairs of a response and a mismatched one would be learned as preferences."""
    method = config.preference.method
    for source in sources:
        if DESIRABLE in source.columns:
            raise UserError(f"{source.artifact}: source {source.name!r} has single responses with the column "
                            f"{DESIRABLE!r}, no pairs, and preference.method = {method} compares pairs; pass "
                            "--method kto, or make pairs (`sov-data pairs`)")


def _fixed_reference(path: Path | None, config: RunConfig) -> Path | None:
    """Return the checkpoint that --reference means.

    Raises:
        UserError: there is none, or the method compares with no reference.
    """
    if path is None:
        return None
    if config.preference.method not in WITH_REFERENCE:
        raise UserError(f"--reference {path}: preference.method = {config.preference.method} compares with "
                        "no reference; leave it out")
    refuse_missing(path, "--reference ")
    return find_checkpoint(path)


def _reference(args: PreferOptions, parsed: ParsedStage, sources: tuple[Source, ...],
               pairs: Sequence[Source], fixed: Path | None) -> Reference:
    """Return the run's reference: complete, where it is another model than the one that is trained.

    Raises:
        UserError: the folder may not be entered, holds another reference, or one that lacks what is needed.
    """
    from megatron_sov.chat.vocabulary import refuse_other_tokens
    from megatron_sov.post.preference import heldout_documents
    from megatron_sov.post.reference import Reference
    from megatron_sov.runs import checkpoints
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import tokenizer_folder

    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    config, folder = parsed.config, RunFolder(args.run)
    reference = Reference(args.run, fixed or parsed.start, sources, config.data.max_seq_len(),
                          {source.name: heldout_documents(source) for source in pairs})
    if fixed is not None:
        refuse_other_tokens(tokenizer_folder(list(sources)), fixed / "tokenizer")
        folder.enter(config, args.resume)
        if not args.dry_run:
            reference.make_apart(fixed, config, args.nproc)
    # a run that goes on must compare with the same reference as before
    elif checkpoints.latest(folder.checkpoints) is not None:
        reference.refuse_changed()
    return reference
