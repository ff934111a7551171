"""`megatron-sov eval lm TARGET --tasks A,B --output OUT.json`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.artifacts import to_json
from megatron_sov.errors import ExitCode
from megatron_sov.generate.engine import ENGINES
from megatron_sov.generate.request import Batching


def add_lm_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `eval lm` takes beside the layout."""
    sub.add_argument("target", metavar="TARGET",
                     help="checkpoint, run (its newest one), Hugging Face folder, or the address of an "
                          "OpenAI-compatible endpoint, up to /v1")
    sub.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks and groups")
    sub.add_argument("--output", type=Path, required=True, metavar="OUT.json",
                     help="results to write; the items come to lie beside it as OUT.items.jsonl")
    sub.add_argument("--task-dir", action="append", type=Path, default=[], metavar="DIR",
                     help="folder with tasks of your own, in lm-eval's form; may be repeated")
    sub.add_argument("--data-dir", type=Path, metavar="DIR", help="what ${DATA} in a task's data files means")
    sub.add_argument("--allow-task-code", action="store_true",
                     help="let --task-dir run code: !function, metrics of its own")
    sub.add_argument("--allow-download", action="store_true",
                     help="fetch data of tasks that want it; lm-eval's own tasks do")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    sub.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front of each item")
    sub.add_argument("--apply-chat-template", action="store_true",
                     help="frame each prompt by the chat template")
    sub.add_argument("--mode", choices=("thinking", "no-thinking"),
                     help="of a reasoning model (default: the task's)")
    sub.add_argument("--cache", type=Path, metavar="DIR",
                     help="folder of answers, which evaluations may share (default: OUT.cache)")
    sub.add_argument("--engine", choices=ENGINES,
                     help="what runs the model (default: transformers for a Hugging Face folder)")
    sub.add_argument("--batch-size", type=int, default=Batching.max_sequences, metavar="N",
                     help="answers that are written at a time (default %(default)s)")
    sub.add_argument("--max-length", type=int, metavar="N",
                     help="longest sequence, in tokens (default: the model's)")
    sub.add_argument("--max-gen-tokens", type=int, metavar="N",
                     help="longest answer, where it is to be shorter than the task's own")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of samples (default %(default)s)")
    sub.add_argument("--workers", type=int, default=0, metavar="N",
                     help="processes that judge (default: one for each core)")
    sub.add_argument("--samples", type=int, metavar="N",
                     help="answers to each item of tasks that sample several (default: the task's)")
    sub.add_argument("--judge", action="append", default=[], metavar="key=value",
                     help="a setting of the reward that judges, e.g. endpoint=URL; may be repeated")
    endpoint = sub.add_argument_group("endpoints")
    endpoint.add_argument("--model", default="", metavar="NAME", help="name that the endpoint knows it by")
    endpoint.add_argument("--tokenizer", type=Path, metavar="DIR",
                          help="its model's tokenizer, without which likelihoods cannot be asked for")
    endpoint.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME",
                          help="variable of the environment with the key (default %(default)s)")
    endpoint.add_argument("--concurrent", type=int, default=16, metavar="N",
                          help="requests under way at a time (default %(default)s)")
    endpoint.add_argument("--same-model", action="store_true",
                          help="the endpoint's model is the one whose answers are kept, though it answers "
                               "fixed questions otherwise")


def run_lm(args: argparse.Namespace) -> int:
    """Measure, write, and print the table.

    Raises:
        UserError: the model, a task or a setting cannot be used.
        StopRequested: a signal asked for it.
    """
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.eval.lm.results import table
    from megatron_sov.eval.lm.run import evaluate
    from megatron_sov.eval.lm.settings import EndpointSettings, Settings
    from megatron_sov.eval.lm.tasks import TaskSources

    sources = TaskSources(folders=tuple(args.task_dir), data_dir=args.data_dir,
                          allow_code=args.allow_task_code, allow_download=args.allow_download)
    endpoint = EndpointSettings(model=args.model, tokenizer=args.tokenizer, key_env=args.key_env,
                                max_concurrent=args.concurrent, same_model=args.same_model)
    settings = Settings(
        output=args.output, sources=sources, cache=args.cache, run=args.run, num_items=args.limit,
        num_fewshot=args.num_fewshot, chat_template=args.apply_chat_template, mode=args.mode,
        engine=args.engine, settings=tuple(args.settings), nproc=args.nproc, batch_size=args.batch_size,
        max_length_tokens=args.max_length, max_gen_tokens=args.max_gen_tokens, seed=args.seed,
        workers=args.workers, samples=args.samples, judge=tuple(args.judge), endpoint=endpoint)
    found = evaluate(args.target, [name for name in args.tasks.split(",") if name], settings)
    if found is not None:
        print(to_json(found).rstrip() if args.json else table(found))
    return ExitCode.OK
