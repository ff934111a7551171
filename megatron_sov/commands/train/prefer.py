"""`megatron-sov prefer RECIPE --from CHECKPOINT --data PAIRS[:weight] ... --run DIR --method dpo`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.commands.evaluate.benchmarks_beside import refuse_unknown_benchmarks
from megatron_sov.commands.train.forgetting_gate import gate_of, refuse_gate
from megatron_sov.commands.train.prefer_rounds import PreferOptions, run_rounds
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE
from megatron_sov.runs.checkpoints import find_checkpoint, refuse_missing
from megatron_sov.train.stages.stage_config import ParsedStage, parse_stage

if TYPE_CHECKING:
    from megatron_sov.engine.data.token_shards import Source
    from megatron_sov.post.reference import Reference
    from megatron_sov.train.stages.gate import GateView


add_arguments = partial(add_options, cls=PreferOptions)


def run(typed: argparse.Namespace) -> int:
    """Learn from preferences; returns 0 when the run is complete."""
    args = read_options(PreferOptions, typed)
    if args.method is not None:
        settings = (*args.settings, f"preference.method={args.method}")
        args = dataclasses.replace(args, settings=settings)
    if args.rounds is not None:
        if args.dry_run:
            raise UserError(f"--dry-run: --rounds {args.rounds} are commands of their own, each of what the "
                            "one before has written; leave one of them out")
        refuse_gate(args, f"--rounds {args.rounds}")
        return run_rounds(args)
    parsed = parse_stage(args, "preference")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    gate = gate_of(args, parsed.config, parsed.start)
    fixed = _fixed_reference(args.reference, parsed.config)

    from megatron_sov.engine.data.token_shards import open_sources
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.preference import objective_of, rank_heldout_pairs
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stages.stage import Stage, run_stage

    config = parsed.config
    objective = objective_of(config)
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, objective.formats))
    _refuse_other_judgements(config, sources)
    pairs = [s for s in sources if s.format == "preference" and config.preference.method != "kto"]
    reference = (_reference(args, parsed, sources, fixed) if config.preference.method in WITH_REFERENCE
                 else None)

    def before(view: GateView) -> None:
        if reference is not None:
            reference.make(view)
        rank_heldout_pairs(view, pairs)

    def after(view: GateView) -> dict[str, Any]:
        return {"heldout_pairs": rank_heldout_pairs(view, pairs)}

    run_stage(Stage(config, RunFolder(args.run), objective, parsed.start, args.resume,
                    sources if reference is None else reference.sources, before=before, after=after,
                    end_gate=gate, faults=parsed.faults, dry_run=args.dry_run), args.nproc, typed.began_s)
    return 0


def _refuse_other_judgements(config: RunConfig, sources: Sequence[Source]) -> None:
    """Raise `UserError` where pairs of a response and a mismatched one would be learned as preferences."""
    from megatron_sov.base.documents.records import DESIRABLE

    method = config.preference.method
    for source in sources:
        if method != "kto" and DESIRABLE in source.columns:
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
               fixed: Path | None) -> Reference:
    """Return the run's reference: complete, where it is another model than the one that is trained.

    Raises:
        UserError: the folder may not be entered, holds another reference, or one that lacks what is needed.
    """
    from megatron_sov.engine.data.token_shards import tokenizer_folder
    from megatron_sov.engine.data.vocabulary import refuse_other_tokens
    from megatron_sov.post.reference import Reference
    from megatron_sov.runs import checkpoints
    from megatron_sov.runs.folder import RunFolder

    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    config, folder = parsed.config, RunFolder(args.run)
    reference = Reference(args.run, fixed or parsed.start, sources, config.data.max_seq_len())
    if fixed is not None:
        refuse_other_tokens(tokenizer_folder(list(sources)), fixed / "tokenizer")
        folder.enter(config, args.resume)
        if not args.dry_run:
            reference.make_apart(fixed, config, args.nproc)
    elif checkpoints.latest(folder.checkpoints) is not None:
        reference.refuse_changed()
    return reference
