"""`megatron-sov prefer RECIPE --from CHECKPOINT --data PAIRS[:weight] ... --run DIR --method dpo`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.commands.train.setup.stage_options import ParsedStage, parse_stage
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import REFERENCE_METHODS, PreferenceMethod
from megatron_sov.model.objectives import get_factory
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, RUN, check_folder_kind, check_model_path, find_checkpoint)

if TYPE_CHECKING:
    from megatron_sov.post.reference import Reference
    from megatron_sov.train.data.token_shards import Source
    from megatron_sov.train.guards.gate import GateView


@dataclass(frozen=True, kw_only=True)
class PreferOptions(TunedOptions):
    """Learn from preferences: pairs, groups or judged answers that there are."""

    groups: ClassVar[tuple[str, ...]] = ("preference",)

    method: PreferenceMethod | None = None
    """The loss (--set preference.method=...; default dpo)."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Compare with this model (dpo, ipo, dpo-norm, kto; default: the one of --from)."""


add_arguments = partial(add_options, cls=PreferOptions)


def run(typed: argparse.Namespace) -> int:
    """Learn from preferences; returns 0 when the run is complete."""
    args = read_options(PreferOptions, typed)
    if args.method is not None:
        settings = (*args.settings, f"preference.method={args.method}")
        args = dataclasses.replace(args, settings=settings)
    if is_complete(args, "preference"):
        return 0
    if args.reference is not None and args.reference.is_dir():
        check_folder_kind(args.reference, (RUN, CHECKPOINT_KIND), "a checkpoint or a run")
    parsed = parse_stage(args, "preference")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    gate = gate_of(args, parsed.config, parsed.start)
    # looked up before Megatron is imported
    fixed = _fixed_reference(args.reference, parsed.config)

    from megatron_sov.post.preference import HELDOUT_PAIRS, measure_heldout_pairs, select_objective
    from megatron_sov.post.reference import COLUMN
    from megatron_sov.runs.folder import REFERENCE, RunFolder
    from megatron_sov.train.data.token_shards import describe_input, open_sources
    from megatron_sov.train.objectives.objective import get_columns, get_formats
    from megatron_sov.train.stages.stage import Stage, run_stage

    config = parsed.config
    objective = get_factory(config, select_objective(config))
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, get_formats(objective)))
    needed = get_columns(objective)
    if DESIRABLE not in needed:
        _refuse_other_judgements(config, sources)
    # single judged responses (kto) have no pairs that could be ranked
    pairs = [s for s in sources if s.format == "preference" and DESIRABLE not in needed]
    reference = _reference(args, parsed, sources, pairs, fixed) if COLUMN in needed else None
    reference_of = None if reference is None else reference.heldout_logprobs

    def before(view: GateView) -> None:
        if reference is not None:
            reference.score_heldout(view)
        measure_heldout_pairs(view, pairs, reference_of)

    def after(view: GateView) -> dict[str, Any]:
        return {HELDOUT_PAIRS: measure_heldout_pairs(view, pairs, reference_of)}

    run_stage(Stage(config, RunFolder(args.run), objective, parsed.start, args.resume,
                    sources if reference is None else reference.sources, before=before, after=after,
                    end_gate=gate, faults=parsed.faults, until=args.until, dry_run=args.dry_run,
                    notes=parsed.notes, besides=() if fixed is None else (describe_input(REFERENCE, fixed),)),
              args.nproc)
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
    if config.preference.method not in REFERENCE_METHODS:
        raise UserError(f"--reference {path}: preference.method = {config.preference.method} compares with "
                        "no reference; leave it out")
    check_model_path(path, "--reference ")
    return find_checkpoint(path)


def _reference(args: PreferOptions, parsed: ParsedStage, sources: tuple[Source, ...],
               pairs: Sequence[Source], fixed: Path | None) -> Reference:
    """Return the run's reference: complete, where it is another model than the one that is trained.

    Raises:
        UserError: the folder may not be entered, holds another reference, or one that lacks what is needed.
    """
    from megatron_sov.chat.vocabulary import check_same_tokens
    from megatron_sov.post.preference import find_heldout_documents
    from megatron_sov.post.reference import Reference
    from megatron_sov.runs import checkpoints
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import tokenizer_folder

    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    config, folder = parsed.config, RunFolder(args.run)
    reference = Reference(args.run, fixed or parsed.start, sources, config.data.max_seq_len(),
                          {source.name: find_heldout_documents(source) for source in pairs})
    if fixed is not None:
        check_same_tokens(tokenizer_folder(list(sources)), fixed / "tokenizer")
        folder.enter(config, args.resume)
        if not args.dry_run:
            reference.score_in_processes(fixed, config, args.nproc)
    # a run that goes on must compare with the same reference as before
    elif checkpoints.latest_checkpoint(folder.checkpoints) is not None:
        reference.refuse_changed()
    return reference
