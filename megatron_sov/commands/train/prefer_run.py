"""Runs `megatron-sov prefer`: reference model, reference log-probabilities, and held-out pairs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.commands.train.setup.stage_options import PreferOptions
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.post.preference import HELDOUT_PAIRS, find_heldout_documents, measure_heldout_pairs
from megatron_sov.post.reference import COLUMN, Reference
from megatron_sov.runs.checkpoints import find_checkpoint, latest_checkpoint
from megatron_sov.runs.folder import REFERENCE, RunFolder
from megatron_sov.train.data.sources import Source, describe_input, open_sources, tokenizer_folder
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.objective import get_columns, get_formats
from megatron_sov.train.stages.stage import Stage


def add_reference(request: TrainingRequest, stage: Stage) -> Stage:
    """Open judged responses. If the method needs a reference, score them with the reference."""
    config, options = request.config, request.options
    assert isinstance(options, PreferOptions)
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, get_formats(stage.objective)))
    # earlier versions packed single responses for KTO, next to responses to other prompts
    if unpaired := [source.name for source in sources if "desirable" in source.columns]:
        raise UserError(f"--data {unpaired[0]}: has single responses for KTO, which is no longer here; make "
                        "pairs by `sov-data pairs`")
    pairs = [s for s in sources if s.format == "preference"]
    reference_path = None if options.reference is None else find_checkpoint(options.reference)
    reference = None
    if COLUMN in get_columns(stage.objective):
        reference = _open_reference(request, sources, pairs, reference_path)
    compute_logprobs = None if reference is None else reference.heldout_logprobs

    def measure_before(view: GateView) -> None:
        if reference is not None:
            reference.score_heldout(view)
        measure_heldout_pairs(view, pairs, compute_logprobs)

    def measure_after(view: GateView) -> dict[str, Any]:
        return {HELDOUT_PAIRS: measure_heldout_pairs(view, pairs, compute_logprobs)}

    inputs = () if reference_path is None else (describe_input(REFERENCE, reference_path),)
    return replace(stage, sources=sources if reference is None else reference.sources,
                   before=measure_before, after=measure_after, extra_inputs=inputs)


def _open_reference(request: TrainingRequest, sources: tuple[Source, ...], pairs: Sequence[Source],
                    reference_path: Path | None) -> Reference:
    """Return the run's reference. If it differs from the start, compute its log-probabilities."""
    config, options = request.config, request.options
    assert request.start is not None, f"--from is required, it is {options.start_from}"
    folder = RunFolder(options.run)
    reference = Reference(options.run, reference_path or request.start, sources, config.data.max_seq_len(),
                          {source.name: find_heldout_documents(source) for source in pairs})
    if reference_path is not None:
        check_same_tokens(tokenizer_folder(list(sources)), reference_path / "tokenizer")
        folder.enter(config, options.resume)
        if not options.dry_run:
            reference.score_in_processes(reference_path, config, options.nproc)
    # a resumed run must compare with the same reference
    elif latest_checkpoint(folder.checkpoints) is not None:
        reference.check_unchanged()
    return reference
