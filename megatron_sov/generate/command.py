"""`megatron-sov generate TARGET --prompt TEXT ...`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.errors import UserError
from megatron_sov.generate.prompts import Prompt, read_prompts
from megatron_sov.obs.afterwards import RunEvents

if TYPE_CHECKING:
    from megatron_sov.generate.target import Target

ENGINES = ("megatron", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("target", metavar="TARGET", type=Path, help="checkpoint, run (its newest one) or Hugging Face folder")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeat it")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help='lines with "prompt" and, if wanted, "target"')
    parser.add_argument("--chat", action="store_true", help="frame each prompt as a user's message by the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest continuation (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the smallest set of tokens that holds this probability (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the samples (default %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, help="what runs the model (default: transformers for a Hugging Face folder)")
    parser.add_argument("--nproc", type=int, default=None, metavar="N", help="local processes (engine megatron)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value",
                        help="layout and precision, e.g. --set parallel.ep=2 --set train.precision=bf16 (engine megatron)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="also add the texts to this run's events, for its report")
    parser.add_argument("--json", action="store_true", help="print the texts and tokens as JSON")


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print what the model wrote."""
    prompts = read_prompts(args.prompt, args.prompts)
    _check(args)
    events = RunEvents(args.run)

    from megatron_sov.mcore.cpu import open_door

    open_door()
    from megatron_sov.generate.load import load_tokenizer
    from megatron_sov.generate.target import find_target

    target = find_target(args.target)
    tokenizer = load_tokenizer(target.tokenizer_folder)
    if args.chat and not tokenizer.chat_template:
        raise UserError(f"--chat: {target.tokenizer_folder} has no chat template; leave --chat out, or fine-tune on chats first")
    ids = [_encode(tokenizer, p, args.chat) for p in prompts]
    continuations = _continue(args, target, ids, tokenizer.eos_token_id)
    if continuations is None:
        return 0  # the job's first process prints
    texts = [tokenizer.decode(c, skip_special_tokens=True) for c in continuations]
    _show(args.json, prompts, texts, continuations)
    step = events.last_step() if target.step is None else target.step
    for prompt, text in zip(prompts, texts, strict=True):
        events.add("sample", step=step, prompt=prompt.text, text=text, target=prompt.target)
    return 0


def _check(args: argparse.Namespace) -> None:
    rules = [(args.max_new_tokens >= 1, f"--max-new-tokens {args.max_new_tokens}: must be at least 1"),
             (args.temperature >= 0, f"--temperature {args.temperature}: must not be negative"),
             (0 < args.top_p <= 1, f"--top-p {args.top_p}: must lie in (0, 1]"),
             (args.seed >= 0, f"--seed {args.seed}: must not be negative")]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def _encode(tokenizer, prompt: Prompt, chat: bool) -> list[int]:  # type: ignore[no-untyped-def]
    """Return a prompt's ids, begun as documents in token shards begin: with nothing before the text."""
    if not chat:
        return list(tokenizer.encode(prompt.text, add_special_tokens=False))
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], add_generation_prompt=True,
                                              tokenize=True, return_dict=False))


def _continue(args: argparse.Namespace, target: Target, ids: list[list[int]], eos_id: int | None) -> list[list[int]] | None:
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "eos_id": eos_id}
    engine = args.engine or ("transformers" if target.is_hf else "megatron")
    if engine == "transformers":
        if not target.is_hf:
            raise UserError(f"--engine transformers: {target.path} is a checkpoint; convert it first with `megatron-sov convert`")
        if args.settings or args.nproc is not None:
            raise UserError(f"--set {args.settings} and --nproc {args.nproc} are for --engine megatron; add it or leave them out")
        from megatron_sov.generate.hf import generate_hf, load_hf

        return generate_hf(load_hf(target.path), ids, args.max_new_tokens, **options)
    limit, longest = target.model.max_position_tokens, max(map(len, ids)) + args.max_new_tokens
    if longest > limit:
        raise UserError(f"prompt and --max-new-tokens make {longest} tokens, the model ends at {limit}; shorten one of them")
    from megatron_sov.generate.load import run_policy
    from megatron_sov.generate.sampling import generate

    found: list[list[int]] | None = run_policy(
        target, args.settings, args.nproc, lambda loaded: generate(loaded.policy, ids, args.max_new_tokens, **options))
    return found


def _show(as_json: bool, prompts: list[Prompt], texts: list[str], tokens: list[list[int]]) -> None:
    if as_json:
        print(json.dumps([{"prompt": p.text, "text": t, "tokens": c} for p, t, c in zip(prompts, texts, tokens, strict=True)],
                         ensure_ascii=False, indent=1))
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt.text}{text}\n" if len(prompts) > 1 else f"{prompt.text}{text}")
