"""`megatron-sov generate TARGET --prompt TEXT ...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.artifacts import write_output
from megatron_sov.commands.generate_media import asks_for_media, run_with_media
from megatron_sov.commands.media_options import add_codec_arguments
from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError
from megatron_sov.generate.asking import Asked, asked_of, check_engine, check_length
from megatron_sov.generate.engine import ENGINES, MEGATRON, TRANSFORMERS, Engine, run_engine
from megatron_sov.generate.prompts import Prompt, read_prompts, response_lines
from megatron_sov.generate.request import Batching, Generated, Sampling, Stop
from megatron_sov.outputs import check_output
from megatron_sov.recipes.requested import add_plugin_argument, load_plugins
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.settings import Problem

if TYPE_CHECKING:
    from megatron_sov.generate.target import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("target", metavar="TARGET", type=Path,
                        help="checkpoint, run (its newest one) or Hugging Face folder")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="text to continue; repeat it")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl",
                        help='lines with "prompt" and, if wanted, "target"')
    parser.add_argument("--chat", action="store_true",
                        help="frame each prompt as a user's message by the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="longest continuation (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="0 takes the most probable token (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="sample from the K most probable tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the smallest set of tokens that holds this probability "
                             "(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="seed of the samples (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1, metavar="N",
                        help="continuations of each prompt, with --temperature above 0 (default %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="text that ends a continuation; repeat it")
    parser.add_argument("--speculative", type=int, default=0, metavar="K",
                        help="have the prediction layer draft K tokens for each pass of the model "
                             "(engine megatron)")
    parser.add_argument("--compare-speed", action="store_true",
                        help="with --speculative: decode without drafts as well and tell how much "
                             "faster drafts are")
    _add_media_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=Batching.max_sequences, metavar="N",
                        help="prompts that are continued at a time (default %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=Batching.prefill_tokens, metavar="N",
                        help="tokens of prompts that are read at a time (default %(default)s)")
    parser.add_argument("--engine", choices=ENGINES,
                        help="what runs the model (default: transformers for a Hugging Face folder)")
    parser.add_argument("--nproc", type=int, default=None, metavar="N",
                        help="local processes (engine megatron)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value",
                        help="layout and precision, e.g. --set parallel.ep=2 --set train.precision=bf16 "
                             "(engine megatron)")
    add_plugin_argument(parser)
    parser.add_argument("--run", type=Path, metavar="DIR",
                        help="also add the texts to this run's events, for its report")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl",
                        help="write a line for each continuation, the prompt's fields and `response`, as "
                             "`megatron-sov score` reads them, and print nothing")
    parser.add_argument("--json", action="store_true", help="print the texts and tokens as JSON")
    parser.add_argument("--logprobs", action="store_true",
                        help="with --json: also each token's log-probability, the temperature it belongs "
                             "to, and what ended the text")


def _add_media_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                        help="show it a picture before the prompt; repeat it")
    parser.add_argument("--audio", type=Path, action="append", default=[], metavar="FILE",
                        help="let it hear a sound before the prompt; repeat it")
    parser.add_argument("--out-image", type=Path, metavar="DIR", help="let it draw, and write pictures there")
    parser.add_argument("--out-audio", type=Path, metavar="DIR", help="let it speak, and write sounds there")
    add_codec_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print what the model wrote."""
    load_plugins(args.plugins)
    if asks_for_media(args):
        return run_with_media(args)
    prompts = read_prompts(args.prompt, args.prompts)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                        args.speculative)
    batching = Batching(args.batch_size, args.prefill_tokens)
    _check(args, sampling.problems() + batching.problems())
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    refuse_missing(args.target)
    check_output("--output", args.output)
    events = RunEvents(args.run)

    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.generate.target import find_target

    target = find_target(args.target)
    asked = asked_of(target, [p.text for p in prompts], args.chat)
    stop = Stop(asked.end_ids, tuple(args.stop), asked.decode)
    found = _continue(args, target, asked, sampling, stop, batching)
    if found is None:
        return 0  # the job's first process prints
    texts = [stop.cut_text(asked.decode(c)) for c in found.continuations]
    if args.output is not None:
        write_output(args.output, response_lines(prompts, texts, found))
    else:
        _show(args, prompts, texts, found)
    step = events.last_step() if target.step is None else target.step
    for prompt, text in zip(prompts, texts, strict=True):
        events.add("sample", step=step, prompt=prompt.text, text=text, target=prompt.target)
    return 0


def _check(args: argparse.Namespace, wrong: list[Problem]) -> None:
    rules = [(args.speculative or not args.compare_speed, "--compare-speed: --speculative "
                                                          f"{args.speculative} drafts nothing; "
                                                          "add --speculative 1"),
             (args.samples >= 1, f"--samples {args.samples}: must be at least 1"),
             (args.samples <= 1 or args.temperature > 0,
              f"--samples {args.samples}: are all the same at --temperature {args.temperature:g}; add "
              "--temperature 1"),
             (args.output is None or not args.json, f"--output {args.output}: has lines in place of --json; "
                                                    "leave one of them out"),
             (args.json or not args.logprobs, "--logprobs: goes with --json; add it"),
             ("" not in args.stop, "--stop '': must hold at least one character")]
    problems = [*wrong, *(sentence for holds, sentence in rules if not holds)]
    if problems:
        raise UserError(str(problems[0]))


def _continue(args: argparse.Namespace, target: Target, asked: Asked, sampling: Sampling, stop: Stop,
              batching: Batching) -> Generated | None:
    """Return what the chosen engine writes; None where another process of the job prints."""
    longest = asked.longest + sampling.max_new_tokens
    engine_name = args.engine or (TRANSFORMERS if target.is_hf else MEGATRON)
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(engine_name, target, args.settings, args.nproc, num_drafts=args.speculative)

    def work(engine: Engine) -> dict[str, object]:
        def timed(sampling: Sampling) -> tuple[Generated, float]:
            began_s = time.monotonic()
            return engine.generate(asked.ids, sampling, stop=stop), time.monotonic() - began_s

        plain_s = timed(dataclasses.replace(sampling, num_drafts=0))[1] if args.compare_speed else 0.0
        found, took_s = timed(sampling)
        return {"found": vars(found), "faster": plain_s / took_s}

    answer = run_engine(engine_name, target, work, longest=longest, batching=batching, settings=args.settings,
                        nproc=args.nproc)
    if answer is None:
        return None
    found = Generated(**answer["found"])
    if sampling.num_drafts:
        share = found.accepted / found.drafted if found.drafted else 0.0
        speed = f", {answer['faster']:.2f} times the speed without drafts" if args.compare_speed else ""
        print(f"drafts: {found.drafted}, accepted {share:.1%}{speed}", file=sys.stderr)
    return found


def _show(args: argparse.Namespace, prompts: list[Prompt], texts: list[str], found: Generated) -> None:
    if args.json:
        rows: list[dict[str, object]] = [
            {"prompt": p.text, "text": t, "tokens": c}
            for p, t, c in zip(prompts, texts, found.continuations, strict=True)]
        if args.logprobs:
            for row, logprobs, reason in zip(rows, found.logprobs, found.finish_reasons, strict=True):
                row |= {"logprobs": logprobs, "temperature": found.temperature, "finish_reason": reason}
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for prompt, text in zip(prompts, texts, strict=True):
        shown = f"{prompt.text}{text}"
        if sys.stdout.isatty():
            shown = visible(shown)
        print(f"{shown}\n" if len(prompts) > 1 else shown)
