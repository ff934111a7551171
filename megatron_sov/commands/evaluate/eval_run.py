"""Runs `megatron-sov eval ppl`, `eval needle` and `eval pairs`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, get_args

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.commands.evaluate.eval import NeedleOptions, PairsOptions, PplOptions
from megatron_sov.commands.evaluate.task import OutOptions
from megatron_sov.commands.shared_options import get_target_step
from megatron_sov.eval.heldout_loss import (
    compute_rows_per_batch, evaluate_forward_model, evaluate_hf, open_heldout)
from megatron_sov.eval.needle.suite import NeedleSuite, build_suite, format_table, parse_result, run_suite
from megatron_sov.eval.needle.text import open_haystacks
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import PRECISION_KEY, Engine
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.engines.transformers_engine import HfEngine, load_configured_hf
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import Language, NeedleConfig, parse_data_paths
from megatron_sov.post.document_logprobs import score_documents, score_documents_by_hf
from megatron_sov.post.preference import CHOSEN_LIKELIER, HELDOUT_PAIRS, measure_pairs
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.work.progress.progress_bar import create_bar

LANGUAGES: tuple[Language, ...] = get_args(Language)
DEFAULT_HELDOUT_TOKENS = 65536


def evaluate_ppl(options: PplOptions) -> None:
    """Measure the loss of each source's held-out documents, print the losses and add them to the run."""
    events = RunEvents(options.run)
    target = find_target(options.target)
    seq_len = options.seq_len or target.trained_tokens
    default_tokens = target.config.data.heldout_tokens if target.config else DEFAULT_HELDOUT_TOKENS
    data = open_heldout(parse_data_paths(options.data), seq_len, options.max_tokens or default_tokens,
                        model_vocab_size=target.vocab_size, model_tokenizer=target.tokenizer_folder)

    def measure_policy(loaded: Any) -> dict[str, Any]:
        return {name: asdict(loss) for name, loss in evaluate_forward_model(loaded, data).items()}

    def measure_hf(model: Any) -> dict[str, Any]:
        return {name: asdict(loss) for name, loss in evaluate_hf(model, data).items()}

    losses = measure_target(options, target, measure_policy, measure_hf)
    if losses is not None:
        record_figures(options, losses, _format_losses(losses))
        events.add("eval", step=get_target_step(target, events), heldout=losses)


def evaluate_needle(options: NeedleOptions) -> None:
    events = RunEvents(options.run)
    target = find_target(options.target)
    suite = _build_suite(options, target)

    def measure(engine: Engine) -> dict[str, Any]:
        with create_bar("judging", suite.num_examples, "example", is_first_rank()) as bar:
            return run_suite(suite, engine, bar.update).to_dict()

    result = measure_target(options, target, lambda loaded: measure(MegatronEngine(loaded.policy)),
                            lambda model: measure(HfEngine(model)))
    if result is not None:
        record_figures(options, result, format_table(parse_result(result)))
        events.add("needle", when="eval", step=get_target_step(target, events), **result)


def evaluate_pairs(options: PairsOptions) -> None:
    """Measure how often the model prefers the chosen response of held-out pairs, per source."""
    events = RunEvents(options.run)
    target = find_target(options.target)
    seq_len = options.seq_len or target.trained_tokens
    sources = open_sources(parse_data_paths(options.data), target.vocab_size, ("preference",))
    check_same_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    if not any(source.num_tokens.get("heldout") for source in sources):
        raise UserError(f"--data {', '.join(options.data)}: has no held-out pairs; pack with --heldout 0.02")

    def measure_policy(loaded: Any) -> dict[str, Any]:
        num_rows = compute_rows_per_batch(loaded, seq_len)
        return measure_pairs(sources, lambda documents, chosen: score_documents(
            loaded, documents, chosen, seq_len, num_rows), seq_len)

    def measure_hf(model: Any) -> dict[str, Any]:
        return measure_pairs(sources, lambda documents, chosen: score_documents_by_hf(
            model, documents, chosen, seq_len), seq_len)

    figures = measure_target(options, target, measure_policy, measure_hf)
    if figures is not None:
        record_figures(options, figures, "\n".join(
            f"{source}: chosen likelier than rejected in {100 * row[CHOSEN_LIKELIER]:.1f} % of "
            f"{row['pairs']:,} pairs" for source, row in figures.items()))
        for source, row in figures.items():
            events.add(HELDOUT_PAIRS, step=get_target_step(target, events), source=source, **row)


def measure_target(options: RankOptions, target: Target, measure_policy: Callable[[Any], Any],
                   measure_hf: Callable[[Any], Any]) -> Any:
    """Measure a checkpoint on ranks, or a Hugging Face folder with transformers; None except on rank 0."""
    if not target.is_hf:
        return run_forward_model(target, options.settings, options.nproc, measure_policy)
    rank_options = [f"--set {setting}" for setting in options.settings
                    if setting.partition("=")[0] != PRECISION_KEY]
    if options.nproc is not None:
        rank_options.append(f"--nproc {options.nproc}")
    if rank_options:
        raise UserError(f"{', '.join(rank_options)}: is for checkpoints, and {target.path} is a Hugging Face "
                        "folder; leave it out, or convert it first with `megatron-sov convert from-hf`")
    return measure_hf(load_configured_hf(target.path, options.settings))


def record_figures(options: OutOptions, figures: Any, text: str) -> None:
    """Write figures to --output and print JSON or `text`."""
    if options.out is not None:
        write_output(options.out, format_json(figures))
    print(json.dumps(figures, indent=1, ensure_ascii=False) if options.json else text)


def _format_losses(losses: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, [*losses, "source"]))
    lines = [f"{'source':<{width}}  {'tokens':>9}  {'loss':>8}  {'bits per byte':>13}"]
    for name, row in losses.items():
        lines.append(f"{name:<{width}}  {row['tokens']:>9,}  {row['loss']:>8.4f}  "
                     f"{row['bits_per_byte']:>13.4f}")
    # a single part would repeat the figures of the source
    for field, unit in (("turns", " turns"), ("kinds", "s")):
        for name, row in losses.items():
            parts = row.get(field, {})
            if len(parts) > 1:
                lines += [f"{name}, {part}{unit}: {figures['tokens']:,} tokens, loss {figures['loss']:.4f}"
                          for part, figures in parts.items()]
    return "\n".join(lines)


def _build_suite(options: NeedleOptions, target: Target) -> NeedleSuite:
    """Build the suite from the options and the target's settings. Raises `UserError`: missing text, a text
    with another tokenizer, or sizes without an example."""
    sources = open_sources(parse_data_paths(options.data), target.vocab_size or sys.maxsize, is_fixed=True)
    check_same_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    config = _apply_options(options, target.config.needle if target.config else NeedleConfig())
    haystacks = open_haystacks(sources, "heldout", target.tokenizer_folder, languages=config.languages,
                               source_languages=dict(map(_parse_source_language, options.language)))
    return build_suite(config, haystacks, seed=options.seed)


def _apply_options(options: NeedleOptions, config: NeedleConfig) -> NeedleConfig:
    values: dict[str, Any] = {
        "kinds": options.kinds, "languages": options.languages, "lengths_tokens": options.lengths,
        "depths": options.depths, "samples": options.samples, "distractor_share": options.distractor_share}
    return replace(config, **{name: value for name, value in values.items() if value not in (None, ())})


def _parse_source_language(word: str) -> tuple[str, Language]:
    name, _, text = word.rpartition("=")
    language = next((language for language in LANGUAGES if language == text), None)
    if language is None or not name:
        raise UserError(f"--language {word}: must be SOURCE=LANGUAGE; languages are {', '.join(LANGUAGES)}")
    return name, language
