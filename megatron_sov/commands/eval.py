"""`megatron-sov eval ppl | needle | pairs | passk | media | lm | play | suites | logits | bigram`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.artifacts import to_json, write_output
from megatron_sov.commands.eval_lm import add_lm_arguments, run_lm
from megatron_sov.commands.eval_media import add_media_arguments, run_media
from megatron_sov.commands.eval_needle import add_needle_arguments, suite_of
from megatron_sov.commands.eval_options import PARITY_LENGTHS, with_ranks, with_record
from megatron_sov.commands.eval_passk import add_passk_arguments, run_passk
from megatron_sov.commands.eval_play import add_play_arguments, run_play
from megatron_sov.commands.eval_suites import add_suites_arguments, run_suites
from megatron_sov.config import data_paths
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.outputs import check_output
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first

if TYPE_CHECKING:
    from megatron_sov.generate.engine import ChoosingEngine
    from megatron_sov.generate.target import Target

DEFAULT_SEQ_LEN, DEFAULT_HELDOUT_TOKENS, DEFAULT_TRAIN_TOKENS = 4096, 65536, 100_000_000
MEDIA = "from text, pictures and speech to one another, judged by what is recognised"
SUITES = "the benchmarks that come along: list them, check their data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tasks."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def task(name: str, text: str) -> argparse.ArgumentParser:
        sub = tasks.add_parser(name, help=text, description=text)
        with_record(sub)
        return sub

    def with_data(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data", action="append", required=True, metavar="DIR",
                         help="token shards with held-out documents")

    def with_length(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--seq-len", type=int, metavar="N",
                         help="tokens of a row (default: the longest that was trained on)")

    def with_cut(sub: argparse.ArgumentParser) -> None:
        with_length(sub)
        sub.add_argument("--max-tokens", type=int, metavar="N",
                         help="held-out tokens of a source (default: the run's setting)")

    target = {"metavar": "TARGET", "type": Path,
              "help": "checkpoint, run (its newest one) or Hugging Face folder"}
    ppl = task("ppl", "loss and bits per byte on held-out documents, per source")
    ppl.add_argument("target", **target)  # type: ignore[arg-type]
    needle = task("needle", "find what a context says again, at any depth of any length, among other needles")
    needle.add_argument("target", **target)  # type: ignore[arg-type]
    add_needle_arguments(needle)
    pairs = task("pairs",
                 "share of held-out pairs whose better answer the model would rather write")
    pairs.add_argument("target", **target)  # type: ignore[arg-type]
    passk = task("passk", "sample responses to prompts, have a reward judge them, estimate pass@k and maj@k")
    add_passk_arguments(passk)
    media = add_media_arguments(task("media", MEDIA))
    lm = task("lm", "score a model on tasks of lm-eval's form, by its own prompts and metrics, offline")
    add_lm_arguments(lm)
    logits = task("logits", "compare a checkpoint's logits with those of its Hugging Face folder in "
                            "transformers; exit code 3")
    logits.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                        help="checkpoint or run (its newest one)")
    logits.add_argument("hf_dir", metavar="HF_DIR", type=Path, help="Hugging Face folder of the same model")
    logits.add_argument("--lengths", type=int, nargs="+", default=PARITY_LENGTHS, metavar="N",
                        help="tokens of the random documents that are compared (default 1 7 64 200)")
    bigram = task("bigram", "the Kneser-Ney bigram baseline on the same held-out documents")
    bigram.add_argument("--max-train-tokens", type=int, default=DEFAULT_TRAIN_TOKENS, metavar="N",
                        help="training tokens of each source that are counted at most (default %(default)s)")
    play = task("play", "have a model play a benchmark's tasks with tools, and score its episodes")
    add_play_arguments(play)
    add_suites_arguments(tasks.add_parser("suites", help=SUITES, description=SUITES))
    for sub in (ppl, pairs, bigram):
        with_data(sub)
    for sub in (ppl, needle, pairs):
        sub.add_argument("--out", type=Path, metavar="FILE",
                         help="also write the figures into a JSON file, which appears whole")
    for sub in (ppl, needle, pairs, passk, media, lm, play, logits):
        with_ranks(sub)
    with_length(pairs)
    for sub in (ppl, bigram):
        with_cut(sub)


def run(args: argparse.Namespace) -> int:
    """Run the chosen task; returns the exit code."""
    if args.task == "lm":  # whose target may be an address
        return run_lm(args)
    if args.task == "play":  # likewise
        return run_play(args)
    if args.task == "suites":  # which are no model's
        return run_suites(args)
    events = RunEvents(args.run)
    check_output("--out", getattr(args, "out", None))
    for option, value in (("--seq-len", "seq_len"), ("--max-tokens", "max_tokens")):
        if (number := getattr(args, value, None)) is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    for name in ("target", "checkpoint", "hf_dir"):
        if (model := getattr(args, name, None)) is not None:
            refuse_missing(model)
    if args.task == "passk":
        return run_passk(args, events)
    if args.task == "media":
        return run_media(args, events)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    tasks = {"ppl": _ppl, "needle": _needle, "pairs": _pairs, "logits": _logits, "bigram": _bigram}
    return tasks[args.task](args, events)


def _ppl(args: argparse.Namespace, events: RunEvents) -> int:
    from megatron_sov.eval.heldout import open_heldout
    from megatron_sov.eval.perplexity import evaluate_forward_model, evaluate_hf
    from megatron_sov.generate.target import find_target

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

    found = _measure(args, target, policy_losses, hf_losses)
    if found is not None:
        _write(args.out, found)
        events.add("eval", step=_step(target, events), heldout=found)
        _show(args.json, found, _loss_table(found))
    return ExitCode.OK


def _measure(args: argparse.Namespace, target: Target, on_policy: Callable[[Any], Any],
             on_hf: Callable[[Any], Any]) -> Any:
    """Return what the task found, a checkpoint on ranks, a Hugging Face folder in transformers; None:
    not ours to print."""
    if not target.is_hf:
        from megatron_sov.generate.load import run_forward_model

        return run_forward_model(target, args.settings, args.nproc, on_policy)
    if args.settings or args.nproc is not None:
        raise UserError(f"--set {args.settings} and --nproc {args.nproc} are for checkpoints, {target.path} "
                        "is a Hugging Face folder; leave them out, or convert it first with `megatron-sov "
                        "convert from-hf`")
    from megatron_sov.generate.hf import load_hf

    return on_hf(load_hf(target.path))


def _needle(args: argparse.Namespace, events: RunEvents) -> int:
    from megatron_sov.eval.needle.suite import result_of, run_suite, table
    from megatron_sov.generate.generator import MegatronEngine
    from megatron_sov.generate.hf import HfEngine
    from megatron_sov.generate.target import find_target

    target = find_target(args.target)
    suite = suite_of(args, target)

    def judged(engine: ChoosingEngine) -> dict[str, Any]:
        with work_bar("judging", suite.num_examples, "example", is_first()) as bar:
            return run_suite(suite, engine, bar.update).to_dict()

    found = _measure(args, target, lambda loaded: judged(MegatronEngine(loaded.policy)),
                     lambda model: judged(HfEngine(model)))
    if found is not None:
        _write(args.out, found)
        events.add("needle", when="eval", step=_step(target, events), **found)
        _show(args.json, found, table(result_of(found)))
    return ExitCode.OK


def _pairs(args: argparse.Namespace, events: RunEvents) -> int:
    from megatron_sov.data.token_shards import open_sources, tokenizer_folder
    from megatron_sov.data.vocabulary import refuse_other_tokens
    from megatron_sov.eval.perplexity import rows_per_batch
    from megatron_sov.generate.target import find_target
    from megatron_sov.post.document_logprobs import document_logprobs, document_logprobs_hf
    from megatron_sov.post.ranking import ranked

    target = find_target(args.target)
    seq_len = args.seq_len or target.trained_tokens
    sources = open_sources(data_paths(args.data), target.vocab_size, ("preference",))
    refuse_other_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    if not any(s.num_tokens.get("heldout") for s in sources):
        raise UserError(f"--data {', '.join(args.data)}: holds no pairs out, so there is nothing to judge "
                        "by; pack with --heldout 0.02")

    def of_policy(loaded: Any) -> dict[str, Any]:
        size = rows_per_batch(loaded, seq_len)
        return ranked(sources, lambda documents, chosen: document_logprobs(
            loaded, documents, chosen, seq_len, size), seq_len)

    def of_hf(model: Any) -> dict[str, Any]:
        return ranked(sources, lambda documents, chosen: document_logprobs_hf(
            model, documents, chosen, seq_len), seq_len)

    found = _measure(args, target, of_policy, of_hf)
    if found is not None:
        _write(args.out, found)
        for source, figures in found.items():
            events.add("heldout_pairs", step=_step(target, events), source=source, **figures)
        _show(args.json, found, "\n".join(
            f"{source}: {100 * r['right']:.1f} % of {r['pairs']:,} pairs are ranked right"
            for source, r in found.items()))
    return ExitCode.OK


def _logits(args: argparse.Namespace, events: RunEvents) -> int:
    from megatron_sov.convert import is_hf_folder
    from megatron_sov.eval.parity import compare_logits, random_prompts
    from megatron_sov.generate.target import Target
    from megatron_sov.runs.checkpoints import find_checkpoint

    if not is_hf_folder(args.hf_dir):
        raise UserError(f"{args.hf_dir}: is not a Hugging Face folder; "
                        "pass what `megatron-sov convert to-hf` wrote")
    if min(args.lengths) < 1:
        raise UserError(f"--lengths {min(args.lengths)}: must be at least 1")
    checkpoint = find_checkpoint(args.checkpoint)
    prompts = random_prompts(args.lengths, Target(checkpoint, False).vocab_size)
    checks = compare_logits(checkpoint, args.hf_dir, prompts, settings=args.settings, nproc=args.nproc)
    if not checks:
        return ExitCode.OK
    events.add("conversion", target="the logits", checks=[asdict(c) for c in checks])
    lines = [f"{'ok  ' if c.passed else 'FAIL'}  {c.name}: {c.value:g} (limit "
             f"{c.limit:g}) {c.detail}".rstrip() for c in checks]
    _show(args.json, [asdict(c) for c in checks], "\n".join(lines))
    return ExitCode.OK if all(c.passed for c in checks) else ExitCode.GATE_FAILED


def _bigram(args: argparse.Namespace, events: RunEvents) -> int:
    from megatron_sov.eval.bigram import evaluate_bigram
    from megatron_sov.eval.heldout import open_heldout
    from megatron_sov.runs.folder import RunFolder

    config = RunFolder(args.run).config() if args.run else None
    seq_len = args.seq_len or (config.data.max_seq_len() if config else DEFAULT_SEQ_LEN)
    max_tokens = args.max_tokens or (config.data.heldout_tokens if config else DEFAULT_HELDOUT_TOKENS)
    data = open_heldout(data_paths(args.data), seq_len, max_tokens)
    found = {name: asdict(r) for name, r in evaluate_bigram(data, args.max_train_tokens).items()}
    events.add("baseline", bigram=found)
    _show(args.json, found, _loss_table(found))
    return ExitCode.OK


def _step(target: Target, events: RunEvents) -> int | None:
    """Return the step of a checkpoint; an export is taken to be of the run's last one."""
    return events.last_step() if target.step is None else target.step


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


def _write(out: Path | None, values: Any) -> None:
    if out is not None:
        write_output(out, to_json(values))


def _show(as_json: bool, values: Any, text: str) -> None:
    print(json.dumps(values, indent=1, ensure_ascii=False) if as_json else text)
