"""`megatron-sov eval ppl | needle | pairs | passk | media | lm | play | suites | logits | bigram`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.command_line import Command
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.pages.markdown import address_of
from megatron_sov.base.settings import Actions, AtLeastOne, Flag, add_actions, run_action
from megatron_sov.commands.models.generate import EvalMediaOptions, check_media, media_decoders, shown_media
from megatron_sov.commands.shared_options import (
    PARITY_LENGTHS, CheckpointPath, ModelPath, RecordOptions, step_of)
from megatron_sov.eval.media import (
    AUDIO, IMAGE, PAIRS, RETRIEVAL, TEXT, Judge, MediaRow, figures, judge_of, read_rows)
from megatron_sov.infer.request import Batching, RankOptions
from megatron_sov.model.config import Language, NeedleConfig, NeedleKind, data_paths
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.work.progress.progress_bar import work_bar

if TYPE_CHECKING:
    from megatron_sov.eval.needle.suite import NeedleSuite
    from megatron_sov.infer.engine import ChoosingEngine
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.infer.media.media_replies import Replied

SHOWN_SAMPLES = 8
"""Of each pair, in the run's events; the file has all."""


def run_media(args: EvalMediaOptions) -> int:
    """Ask, judge and tell; returns the exit code.

    Raises:
        UserError: bad rows, a pair without a codec or judge, or media that cannot be read.
    """
    events = RunEvents(args.run)
    refuse_missing(args.target)
    asked, ranked = [_rows_of("--data", item, PAIRS) for item in args.data], retrieval_rows(args)
    if not asked and not ranked:
        raise UserError("there is nothing to ask: pass --data PAIR=FILE.jsonl or --retrieval PAIR=FILE.jsonl")
    check_output("--output", args.output)
    judges = _judges(args, {PAIRS[name][1] for name, _ in asked})
    kinds = [kind for _, kind in (PAIRS[name] for name, _ in asked) if kind != TEXT]
    if kinds and args.files is None:
        raise UserError(f"--data: asks for media of kind {kinds[0]}, which need --files DIR to lie in")
    out = {} if args.files is None else dict.fromkeys(kinds, args.files)
    check_media(args, out)
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    found, compared = dict[str, Any](), dict[str, Any]()
    for name, rows in asked:
        told = _pair(args, target, name, rows, judges)
        if told is not None:
            found[name] = told
    for name, rows in ranked:
        compared |= retrieved(args, target, name, rows, events)
    if not found and not compared:
        return ExitCode.OK  # the job's first process tells
    if args.output is not None:
        write_output(args.output, to_json({**found, **compared}))
    step = step_of(target, events)
    for name, told in found.items():
        events.add("media", step=step, pair=name,
                   **{**told, "samples": [_embedded(s) for s in told["samples"][:SHOWN_SAMPLES]]})
    lines = [*(_line(name, told) for name, told in found.items()),
             *(retrieval_line(name, told) for name, told in compared.items())]
    print(to_json({n: {k: v for k, v in t.items() if k not in ("samples", "ranks")}
                   for n, t in {**found, **compared}.items()}).rstrip() if args.json else "\n".join(lines))
    return ExitCode.OK


def _rows_of(option: str, item: str, pairs: Collection[str]) -> tuple[str, list[MediaRow]]:
    """Return the name and the rows of PAIR=FILE.jsonl."""
    name, _, file = item.partition("=")
    if name not in pairs or not file:
        raise UserError(f"{option} {item}: must have the form PAIR=FILE.jsonl, with one of "
                        f"{', '.join(pairs)}")
    return name, read_rows(Path(file))


def _judges(args: EvalMediaOptions, kinds: set[str]) -> dict[str, Judge]:
    found = {}
    for kind in (IMAGE, AUDIO):
        said = getattr(args, f"{kind}_judge")
        if kind in kinds and said is None:
            raise UserError(f"--data: asks for media of kind {kind}, which needs --{kind}-judge: who "
                            "recognises what the model makes")
        if said is not None:
            found[kind] = judge_of(said)
    return found


def _pair(args: EvalMediaOptions, target: Any, name: str, rows: list[MediaRow],
          judges: dict[str, Judge]) -> dict[str, Any] | None:
    """Return figures and samples of a pair; None on other processes than the first."""
    from megatron_sov.infer.media.media_replies import Asking, replies

    kind = PAIRS[name][1]
    out = {} if kind == TEXT or args.files is None else {kind: args.files / name}
    asking = Asking(shown_media(args, args.media_root), media_decoders(args, args.sampling.seed), out,
                    args.sampling, chat=not args.no_chat, max_audio_tokens=args.max_audio_tokens,
                    batching=Batching(args.batch_size), with_features=not args.no_features)
    replied = replies(target, [row.content for row in rows], asking, settings=args.settings, nproc=args.nproc)
    if replied is None:
        return None
    heard = _recognised(rows, replied, kind, judges)
    samples = [_sample(row, reply, text, args.media_root)
               for row, reply, text in zip(rows, replied, heard, strict=True)]
    return {**figures(rows, heard), "samples": samples}


def _files(reply: Replied, kind: str) -> list[Path]:
    return reply.made.pictures if kind == IMAGE else reply.made.sounds


def _recognised(rows: Sequence[MediaRow], replied: Sequence[Replied], kind: str,
                judges: dict[str, Judge]) -> list[str]:
    """Return what each reply says, or what a judge recognises in its first file; "" where it made none."""
    if kind == TEXT:
        return [reply.text for reply in replied]
    made = [(n, _files(reply, kind)[0]) for n, reply in enumerate(replied) if _files(reply, kind)]
    told = judges[kind]([file for _, file in made], [rows[n].labels for n, _ in made]) if made else []
    found = [""] * len(rows)
    for (n, _), text in zip(made, told, strict=True):
        found[n] = text
    return found


def _sample(row: MediaRow, reply: Replied, heard: str, root: Path) -> dict[str, Any]:
    """Return a sample as files and events have it: paths are absolute."""
    content = [{**part, "path": str((root / part["path"]).resolve())} if "path" in part else part
               for part in row.content]
    return {"content": content, "answer": row.answer, "recognised": heard, "text": reply.text,
            "pictures": [str(file.resolve()) for file in reply.made.pictures],
            "sounds": [str(file.resolve()) for file in reply.made.sounds],
            "broken_pictures": reply.made.num_broken, "tokens": reply.made.tokens}


def _embedded(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with its media inside, as far as they are small, in the place of paths and tokens."""
    content = [{"type": part["type"], "address": address_of(Path(part["path"]))} if "path" in part else part
               for part in sample["content"]]
    made = [address_of(Path(file)) for file in (*sample["pictures"], *sample["sounds"])]
    return {"content": content, "answer": sample["answer"], "recognised": sample["recognised"],
            "text": sample["text"], "addresses": [address for address in made if address]}


def _line(name: str, told: dict[str, Any]) -> str:
    low, high = told["accuracy_interval"]
    chance = f", chance {told['chance']:.1%}" if "chance" in told else ""
    errors = f", WER {told['wer']:.3f}, CER {told['cer']:.3f}" if "wer" in told else ""
    return (f"{name:<12} {told['num_rows']:>5} rows: right {told['accuracy']:.1%} "
            f"({low:.1%} to {high:.1%}){chance}{errors}")


EVENT = "media_retrieval"


def retrieval_rows(args: EvalMediaOptions) -> list[tuple[str, list[MediaRow]]]:
    """Return the pairs that are asked for, with their rows.

    Raises:
        UserError: there is no such pair, or rows are malformed.
    """
    found = []
    for item in args.retrieval:
        name, rows = _rows_of("--retrieval", item, RETRIEVAL)
        kind = RETRIEVAL[name][0].partition("-")[0]
        if bare := [n for n, row in enumerate(rows, 1) if all(part.get("type") != kind for part in
                                                             row.content)]:
            raise UserError(f"--retrieval {item}: row {bare[0]} shows no {kind}; each shows one to be found")
        if len({row.answer for row in rows}) < 2:
            raise UserError(f"--retrieval {item}: all rows have one answer, so there is nothing to choose "
                            "from; pass rows of several")
        found.append((name, rows))
    return found


def retrieved(args: EvalMediaOptions, target: Target, name: str, rows: list[MediaRow],
              events: RunEvents) -> dict[str, Any]:
    """Return direction -> figures of a pair; {} on other processes than the first."""
    from megatron_sov.eval.media import grouped, likelihoods, rank_figures, ranks

    groups = grouped(rows, args.candidates, args.sampling.seed)
    scores = likelihoods(target, rows, groups, shown_media(args, args.media_root), chat=not args.no_chat,
                         with_features=not args.no_features, batching=Batching(args.batch_size),
                         settings=args.settings, nproc=args.nproc)
    if scores is None:
        return {}
    found = {way: rank_figures(of) for way, of in zip(RETRIEVAL[name], ranks(rows, groups, scores),
                                                      strict=True)}
    step = step_of(target, events)
    for way, told in found.items():
        events.add(EVENT, step=step, pair=way, **{k: v for k, v in told.items() if k != "ranks"})
    return {f"retrieval/{way}": told for way, told in found.items()}


def retrieval_line(name: str, told: dict[str, Any]) -> str:
    shares = []
    for k in (1, 5):
        low, high = told[f"recall_at_{k}_interval"]
        shares.append(f"recall@{k} {told[f'recall_at_{k}']:.1%} ({low:.1%} to {high:.1%}; chance "
                      f"{told[f'chance_at_{k}']:.1%})")
    return (f"{name:<22} {told['num_questions']:>5} questions, {told['num_candidates']:.0f} candidates: "
            f"{', '.join(shares)}, mean rank {told['mean_rank']:.2f} (chance {told['chance_mean_rank']:.2f})")


LANGUAGES: tuple[Language, ...] = get_args(Language)
DEFAULT_SEQ_LEN, DEFAULT_HELDOUT_TOKENS, DEFAULT_TRAIN_TOKENS = 4096, 65536, 100_000_000

@dataclass(frozen=True, kw_only=True)
class OutOptions(RecordOptions):
    """What tasks take whose figures a file may keep."""

    out: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write the figures into a JSON file, which appears whole."""


@dataclass(frozen=True, kw_only=True)
class HeldoutOptions(RecordOptions):
    """What tasks take that read held-out documents."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    seq_len: AtLeastOne | None = None
    """Tokens of a row (default: the longest that was trained on)."""


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
    """Find what a context says again, at any depth of any length, among other needles."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")] = ()
    """Token shards with held-out documents."""
    text: Annotated[tuple[str, ...], Flag(value="LANGUAGE=FILE")] = ()
    """A text file that needles are hidden in; languages: english, korean, thai, code."""
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
    by: Literal["generation", "likelihood"] = "generation"
    """Greedy decoding, or the most probable of all words."""
    seed: int = 0
    """Of keys, values and text (default 0)."""
    target: ModelPath


@dataclass(frozen=True, kw_only=True)
class LogitsOptions(RecordOptions, RankOptions):
    """Compare a checkpoint's logits with those of its Hugging Face folder in transformers; exit code 3 where
    they differ."""

    checkpoint: CheckpointPath
    hf_dir: Annotated[Path, Flag("HF_DIR")]
    """Hugging Face folder of the same model."""
    lengths: Annotated[tuple[AtLeastOne, ...], Flag(many=True)] = PARITY_LENGTHS
    """Tokens of the random documents that are compared."""


@dataclass(frozen=True, kw_only=True)
class BigramOptions(CutOptions):
    """The Kneser-Ney bigram baseline on the same held-out documents."""

    max_train_tokens: AtLeastOne = DEFAULT_TRAIN_TOKENS
    """Training tokens of each source that are counted at most."""


def begin_task(args: RecordOptions, *models: Path, out: Path | None = None) -> RunEvents:
    """Refuse what cannot be read or written, before Megatron is imported; returns the run's events."""
    events = RunEvents(args.run)
    check_output("--out", out)
    for model in models:
        refuse_missing(model)
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    return events


def _ppl(args: PplOptions) -> int:
    events = begin_task(args, args.target, out=args.out)
    from megatron_sov.eval.heldout import evaluate_forward_model, evaluate_hf, open_heldout
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    config = target.config
    seq_len = args.seq_len or target.trained_tokens
    max_tokens = args.max_tokens or (config.data.heldout_tokens if config else DEFAULT_HELDOUT_TOKENS)
    data = open_heldout(data_paths(args.data), seq_len, max_tokens, model_vocab_size=target.vocab_size,
                        model_tokenizer=target.tokenizer_folder)

    def policy_losses(loaded: Any) -> dict[str, Any]:
        return {name: asdict(r) for name, r in evaluate_forward_model(loaded, data).items()}

    def hf_losses(model: Any) -> dict[str, Any]:
        return {name: asdict(r) for name, r in evaluate_hf(model, data).items()}

    found = measure_target(args, target, policy_losses, hf_losses)
    if found is not None:
        write_figures(args.out, found)
        events.add("eval", step=step_of(target, events), heldout=found)
        show_figures(args.json, found, _loss_table(found))
    return ExitCode.OK


def measure_target(args: RankOptions, target: Target, on_policy: Callable[[Any], Any],
                   on_hf: Callable[[Any], Any]) -> Any:
    """Return what the task found, a checkpoint on ranks, a Hugging Face folder in transformers; None:
    not ours to print."""
    if not target.is_hf:
        from megatron_sov.infer.engines.load import run_forward_model

        return run_forward_model(target, args.settings, args.nproc, on_policy)
    given = [*(f"--set {setting}" for setting in args.settings),
             *([] if args.nproc is None else [f"--nproc {args.nproc}"])]
    if given:
        raise UserError(f"{', '.join(given)}: is for checkpoints, and {target.path} is a Hugging Face "
                        "folder; leave it out, or convert it first with `megatron-sov convert from-hf`")
    from megatron_sov.infer.engines.libraries import load_hf

    return on_hf(load_hf(target.path))


def _needle(args: NeedleOptions) -> int:
    events = begin_task(args, args.target, out=args.out)
    from megatron_sov.eval.needle.suite import result_of, run_suite, table
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.engines.libraries import HfEngine
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    suite = suite_of(args, target)

    def judged(engine: ChoosingEngine) -> dict[str, Any]:
        with work_bar("judging", suite.num_examples, "example", is_first()) as bar:
            return run_suite(suite, engine, bar.update).to_dict()

    found = measure_target(args, target, lambda loaded: judged(MegatronEngine(loaded.policy)),
                           lambda model: judged(HfEngine(model)))
    if found is not None:
        write_figures(args.out, found)
        events.add("needle", when="eval", step=step_of(target, events), **found)
        show_figures(args.json, found, table(result_of(found)))
    return ExitCode.OK


def _logits(args: LogitsOptions) -> int:
    events = begin_task(args, args.checkpoint, args.hf_dir)
    from megatron_sov.engine.convert import is_hf_folder
    from megatron_sov.eval.parity import compare_logits, random_prompts
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.runs.checkpoints import find_checkpoint

    if not is_hf_folder(args.hf_dir):
        raise UserError(f"{args.hf_dir}: is not a Hugging Face folder; "
                        "pass what `megatron-sov convert to-hf` wrote")
    checkpoint = find_checkpoint(args.checkpoint)
    prompts = random_prompts(args.lengths, Target(checkpoint, False).vocab_size)
    checks = compare_logits(checkpoint, args.hf_dir, prompts, settings=args.settings, nproc=args.nproc)
    if not checks:
        return ExitCode.OK
    events.add("conversion", target="the logits", checks=[asdict(c) for c in checks])
    lines = [f"{'ok  ' if c.passed else 'FAIL'}  {c.name}: {c.value:g} (limit "
             f"{c.limit:g}) {c.detail}".rstrip() for c in checks]
    show_figures(args.json, [asdict(c) for c in checks], "\n".join(lines))
    return ExitCode.OK if all(c.passed for c in checks) else ExitCode.GATE_FAILED


def _bigram(args: BigramOptions) -> int:
    events = begin_task(args)
    from megatron_sov.eval.heldout import evaluate_bigram, open_heldout
    from megatron_sov.runs.folder import RunFolder

    config = RunFolder(args.run).config() if args.run else None
    seq_len = args.seq_len or (config.data.max_seq_len() if config else DEFAULT_SEQ_LEN)
    max_tokens = args.max_tokens or (config.data.heldout_tokens if config else DEFAULT_HELDOUT_TOKENS)
    data = open_heldout(data_paths(args.data), seq_len, max_tokens)
    found = {name: asdict(r) for name, r in evaluate_bigram(data, args.max_train_tokens).items()}
    events.add("baseline", bigram=found)
    show_figures(args.json, found, _loss_table(found))
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


def write_figures(out: Path | None, values: Any) -> None:
    if out is not None:
        write_output(out, to_json(values))


def show_figures(as_json: bool, values: Any, text: str) -> None:
    print(json.dumps(values, indent=1, ensure_ascii=False) if as_json else text)


def suite_of(args: NeedleOptions, target: Target) -> NeedleSuite:
    """Return the suite that the arguments and the target's settings describe.

    Raises:
        UserError: there is no text, it does not fit the model, or the numbers make no test.
    """
    from megatron_sov.engine.data.token_shards import open_sources, tokenizer_folder
    from megatron_sov.engine.data.vocabulary import refuse_other_tokens
    from megatron_sov.eval.needle.suite import make_suite
    from megatron_sov.eval.needle.text import open_haystacks

    if not args.data and not args.text:
        raise UserError("there is no text to hide needles in: pass --data DIR or --text LANGUAGE=FILE")
    sources = open_sources(data_paths(args.data), target.vocab_size or sys.maxsize) if args.data else []
    refuse_other_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    config = _config(args, target.config.needle if target.config else NeedleConfig())
    told = {name: language for language, name in (_named(word, "--language", True) for word in args.language)}
    files = [(language, Path(name))
             for language, name in (_named(word, "--text", False) for word in args.text)]
    haystacks = open_haystacks(sources, "heldout", target.tokenizer_folder, languages=config.languages,
                               told=told, files=files)
    return make_suite(config, haystacks, seed=args.seed, by=args.by)


def _config(args: NeedleOptions, defaults: NeedleConfig) -> NeedleConfig:
    given: dict[str, Any] = {"kinds": args.kinds, "languages": args.languages, "lengths_tokens": args.lengths,
                             "depths": args.depths, "samples": args.samples,
                             "distractor_share": args.distractor_share}
    return replace(defaults, **{k: v for k, v in given.items() if v not in (None, ())})


def _named(word: str, option: str, language_last: bool) -> tuple[Language, str]:
    """Return language and name of LANGUAGE=NAME or NAME=LANGUAGE."""
    name, found, language = word.rpartition("=") if language_last else word.partition("=")[::-1]
    if not found or language not in LANGUAGES or not name:
        form = "SOURCE=LANGUAGE" if language_last else "LANGUAGE=FILE"
        raise UserError(f"{option} {word}: must be {form}; languages are {', '.join(LANGUAGES)}")
    return next(known for known in LANGUAGES if known == language), name


ACTIONS: Actions = {
    "ppl": (PplOptions, _ppl), "needle": (NeedleOptions, _needle),
    "pairs": Command("megatron_sov.commands.evaluate.eval_judged:PAIRS",
                     "Share of held-out pairs whose better answer the model would rather write"),
    "passk": Command("megatron_sov.commands.evaluate.eval_judged:PASSK",
                     "Sample responses to prompts, have a reward judge them, estimate pass@k and maj@k"),
    "media": (EvalMediaOptions, run_media),
    "lm": Command("megatron_sov.commands.evaluate.benchmarks:LM",
                  "Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline"),
    "logits": (LogitsOptions, _logits), "bigram": (BigramOptions, _bigram),
    "play": Command("megatron_sov.commands.evaluate.eval_play:PLAY",
                    "Have a model play a benchmark's tasks with tools, and score its episodes"),
    "suites": Command("megatron_sov.commands.evaluate.benchmarks:SUITES",
                      "The benchmarks that come along: list them, check their data")}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
