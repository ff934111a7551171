"""`megatron-sov eval ppl | needle | pairs | passk | media | lm`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

from megatron_sov.base.command_line import Command
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import Actions, AtLeastOne, Flag, add_actions, run_action
from megatron_sov.commands.evaluate.task import (
    HeldoutOptions, OutOptions, begin_task, measure_target, show_figures, write_figures)
from megatron_sov.commands.shared_options import ModelPath, get_target_step
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import Language, NeedleConfig, NeedleKind, parse_data_paths
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.work.progress.progress_bar import create_bar

if TYPE_CHECKING:
    from megatron_sov.eval.needle.suite import NeedleSuite
    from megatron_sov.infer.engine import Engine
    from megatron_sov.infer.engines.target import Target

LANGUAGES: tuple[Language, ...] = get_args(Language)
DEFAULT_HELDOUT_TOKENS = 65536


@dataclass(frozen=True, kw_only=True)
class CutOptions(HeldoutOptions):
    """What tasks take that read a part of them."""

    max_tokens: AtLeastOne | None = None
    """Held-out tokens of a source (default: the run's setting)."""


@dataclass(frozen=True, kw_only=True)
class PplOptions(CutOptions, OutOptions, RankOptions):
    """Loss and bits per byte on held-out documents, per source."""

    target: ModelPath


@dataclass(frozen=True, kw_only=True)
class NeedleOptions(OutOptions, RankOptions):
    """Needle-in-a-haystack accuracy by length and depth, among other needles."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    language: Annotated[tuple[str, ...], Flag(value="SOURCE=LANGUAGE")] = ()
    """A source's language, where its text does not show it."""
    kinds: Annotated[tuple[NeedleKind, ...], Flag(many=True)] = ()
    """What is asked (default: the setting)."""
    languages: Annotated[tuple[Language, ...], Flag(many=True)] = ()
    """Languages of the text (default: all that there is)."""
    lengths: Annotated[tuple[int, ...], Flag(many=True)] = ()
    """Context lengths in tokens (default: the setting)."""
    depths: Annotated[tuple[float, ...], Flag(value="D", many=True)] = ()
    """Places of the first needle, 0 = start, 1 = end."""
    samples: int | None = None
    """Examples of a cell (default: the setting)."""
    distractor_share: Annotated[float | None, Flag(value="S")] = None
    """Part of each context that needles with other keys fill (default: the setting)."""
    seed: int = 0
    """Of keys, values and text (default 0)."""
    target: ModelPath


def _ppl(args: PplOptions) -> int:
    events = begin_task(args, args.target, out=args.out)
    from megatron_sov.eval.heldout_loss import evaluate_forward_model, evaluate_hf, open_heldout
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    config = target.config
    seq_len = args.seq_len or target.trained_tokens
    max_tokens = args.max_tokens or (config.data.heldout_tokens if config else DEFAULT_HELDOUT_TOKENS)
    data = open_heldout(parse_data_paths(args.data), seq_len, max_tokens, model_vocab_size=target.vocab_size,
                        model_tokenizer=target.tokenizer_folder)

    def policy_losses(loaded: Any) -> dict[str, Any]:
        return {name: asdict(r) for name, r in evaluate_forward_model(loaded, data).items()}

    def hf_losses(model: Any) -> dict[str, Any]:
        return {name: asdict(r) for name, r in evaluate_hf(model, data).items()}

    found = measure_target(args, target, policy_losses, hf_losses)
    if found is not None:
        write_figures(args.out, found)
        events.add("eval", step=get_target_step(target, events), heldout=found)
        show_figures(args.json, found, _loss_table(found))
    return ExitCode.OK


def _needle(args: NeedleOptions) -> int:
    events = begin_task(args, args.target, out=args.out)
    from megatron_sov.eval.needle.suite import format_table, parse_result, run_suite
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.infer.engines.transformers_engine import HfEngine

    target = find_target(args.target)
    suite = suite_of(args, target)

    def judged(engine: Engine) -> dict[str, Any]:
        with create_bar("judging", suite.num_examples, "example", is_first_rank()) as bar:
            return run_suite(suite, engine, bar.update).to_dict()

    found = measure_target(args, target, lambda loaded: judged(MegatronEngine(loaded.policy)),
                           lambda model: judged(HfEngine(model)))
    if found is not None:
        write_figures(args.out, found)
        events.add("needle", when="eval", step=get_target_step(target, events), **found)
        show_figures(args.json, found, format_table(parse_result(found)))
    return ExitCode.OK


def _loss_table(found: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, [*found, "source"]))
    rows = [f"{name:<{width}}  {r['tokens']:>9,}  {r['loss']:>8.4f}  {r['bits_per_byte']:>13.4f}"
            for name, r in found.items()]
    # of single turns alone it would say the same once more
    rows += [f"{name}, {part} turns: {turn['tokens']:,} tokens, loss {turn['loss']:.4f}"
             for name, r in found.items() if len(r.get("turns", {})) > 1 for part, turn in r["turns"].items()]
    rows += [f"{name}, {part}s: {kind['tokens']:,} tokens, loss {kind['loss']:.4f}"
             for name, r in found.items() if len(r.get("kinds", {})) > 1 for part, kind in r["kinds"].items()]
    return "\n".join([f"{'source':<{width}}  {'tokens':>9}  {'loss':>8}  {'bits per byte':>13}", *rows])


def suite_of(args: NeedleOptions, target: Target) -> NeedleSuite:
    """Return the suite that the arguments and the target's settings describe.

    Raises:
        UserError: there is no text, it does not fit the model, or the numbers make no test.
    """
    from megatron_sov.chat.vocabulary import check_same_tokens
    from megatron_sov.eval.needle.suite import build_suite
    from megatron_sov.eval.needle.text import open_haystacks
    from megatron_sov.train.data.token_shards import open_sources, tokenizer_folder

    sources = open_sources(parse_data_paths(args.data), target.vocab_size or sys.maxsize, is_fixed=True)
    check_same_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    config = _config(args, target.config.needle if target.config else NeedleConfig())
    haystacks = open_haystacks(sources, "heldout", target.tokenizer_folder, languages=config.languages,
                               source_languages=dict(map(_source_language, args.language)))
    return build_suite(config, haystacks, seed=args.seed)


def _config(args: NeedleOptions, defaults: NeedleConfig) -> NeedleConfig:
    given: dict[str, Any] = {"kinds": args.kinds, "languages": args.languages, "lengths_tokens": args.lengths,
                             "depths": args.depths, "samples": args.samples,
                             "distractor_share": args.distractor_share}
    return replace(defaults, **{k: v for k, v in given.items() if v not in (None, ())})


def _source_language(word: str) -> tuple[str, Language]:
    """Return name and language of SOURCE=LANGUAGE."""
    name, _, language = word.rpartition("=")
    known = next((known for known in LANGUAGES if known == language), None)
    if known is None or not name:
        raise UserError(f"--language {word}: must be SOURCE=LANGUAGE; languages are {', '.join(LANGUAGES)}")
    return name, known


ACTIONS: Actions = {
    "ppl": (PplOptions, _ppl), "needle": (NeedleOptions, _needle),
    "pairs": Command("megatron_sov.commands.evaluate.eval_passk:PAIRS",
                     "Share of held-out pairs whose better answer the model would rather write"),
    "passk": Command("megatron_sov.commands.evaluate.eval_passk:PASSK",
                     "Sample responses to prompts, have a reward judge them, estimate pass@k and maj@k"),
    "media": Command("megatron_sov.commands.evaluate.eval_media:MEDIA",
                     "From text, pictures and speech to one another, judged by what is recognised"),
    "lm": Command("megatron_sov.commands.evaluate.eval_lm:LM",
                  "Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline",
                  page="eval_lm.md")}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
