"""`megatron-sov eval passk`: sample, judge, estimate; each step goes on behind a kill."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.artifacts import MANIFEST, to_json
from megatron_sov.digests import file_digest
from megatron_sov.documents import BadRecord, Conversation
from megatron_sov.documents.messages import read_messages
from megatron_sov.documents.visible import visible
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.generate.asking import asked_of, check_engine, check_length
from megatron_sov.generate.engine import ENGINES, MEGATRON, TRANSFORMERS, Engine, run_engine
from megatron_sov.generate.request import Batching, Sampling, Stop
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.outputs import behind_links
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards import journal
from megatron_sov.rewards.registry import BUILT_IN, Made, make, order
from megatron_sov.rewards.rows import check_rows, read_rows
from megatron_sov.rewards.running import default_workers
from megatron_sov.rewards.scoring import score_file
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.settings import parse_nested

if TYPE_CHECKING:
    from megatron_sov.eval.sampling import Sampled
    from megatron_sov.generate.target import Target

KIND = "passk"
RESULTS, SAMPLES = "results.json", "samples.jsonl"
"""Files of the artifact: the figures, and every response with its reward."""
PROMPT, PROMPT_INDEX = "prompt", "prompt_index"
OF_A_PROBLEM = (PROMPT, "answer", "choices", "tests", "entry_point", "instructions", "instruction_id_list",
                "kwargs", "rubric")
"""Fields in which the responses to one problem do not differ: what is asked, and what rewards read of it."""


def add_passk_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `eval passk` takes beside the layout."""
    sub.add_argument("target", metavar="TARGET", type=Path, nargs="?",
                     help="checkpoint, run (its newest one) or Hugging Face folder that answers --input")
    sub.add_argument("--input", type=Path, metavar="PROMPTS.jsonl",
                     help="a JSON object per line, with `prompt` (text, or messages with --chat) and what "
                          "the reward needs")
    sub.add_argument("--sampled", type=Path, metavar="ROWS.jsonl",
                     help="in place of TARGET and --input: responses that are there already, a row each")
    sub.add_argument("--group-by", metavar="FIELD",
                     help=f"field that --sampled responses to one prompt share (default {PROMPT_INDEX} where "
                          f"rows have it, as those of this command do, else {PROMPT})")
    add_sampling_arguments(sub)
    sub.add_argument("--k", type=int, nargs="+", default=[], metavar="K",
                     help="sizes of the draws (default 1, 2, 4, ... up to the fewest scored samples of a "
                          "prompt)")
    sub.add_argument("--output", type=Path, required=True, metavar="DIR",
                     help="folder to make: the figures, and every response with its reward")
    sub.add_argument("--overwrite", action="store_true", help="replace an output that is there")


def add_sampling_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare how responses are sampled and judged, but for the sizes of the draws."""
    sub.add_argument("--reward", required=True, metavar="NAME",
                     help=f"{', '.join(BUILT_IN)}, or a class of your own, FILE.py:NAME")
    sub.add_argument("--reward-set", action="append", default=[], metavar="key=value",
                     help="a setting of the reward; may be repeated")
    sub.add_argument("--right-from", type=float, default=1.0, metavar="R",
                     help="least reward of a right response (default %(default)s)")
    sub.add_argument("--samples", type=int, default=8, metavar="N",
                     help="responses to each prompt (default %(default)s)")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default %(default)s")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="default: all tokens")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default %(default)s")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (default %(default)s)")
    sub.add_argument("--max-new-tokens", type=int, default=1024, metavar="N",
                     help="longest response (default %(default)s)")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT",
                     help="text that ends a response; repeat it")
    sub.add_argument("--chat", action="store_true", help="frame each prompt by the chat template")
    sub.add_argument("--engine", choices=ENGINES,
                     help="what runs the model (default: transformers for a Hugging Face folder)")
    sub.add_argument("--batch-size", type=int, default=Batching.max_sequences, metavar="N",
                     help="responses that are written at a time (default %(default)s)")
    sub.add_argument("--workers", type=int, default=default_workers(), metavar="N",
                     help="processes that judge (default: one for each core)")


def sampling_words(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `add_sampling_arguments` as a command line has them, but for the processes."""
    words = ["--reward", args.reward]
    for option, values in (("--reward-set", args.reward_set), ("--stop", args.stop)):
        words += [f"{option}={value}" for value in values]  # a value may begin with a dash
    for name in ("right_from", "samples", "temperature", "top_k", "top_p", "seed", "max_new_tokens", "engine",
                 "batch_size", "workers"):
        if (value := getattr(args, name)) is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    return [*words, "--chat"] if args.chat else words


@dataclass(frozen=True)
class _Plan:
    """What a command was asked for, checked."""

    args: argparse.Namespace
    order: Order
    reward: Made
    sampling: Sampling
    target: Target | None
    """None: the responses are there already."""
    group_by: str = PROMPT_INDEX
    """Field that the responses to one prompt share."""

    @property
    def engine(self) -> str:
        assert self.target is not None
        return str(self.args.engine or (TRANSFORMERS if self.target.is_hf else MEGATRON))

    @cached_property
    def model(self) -> dict[str, Any] | None:
        """Which responses are sampled, and how; None: they are there already."""
        if self.target is None:
            return None
        from megatron_sov.convert.resume import fingerprint
        from megatron_sov.eval.sampling import CALL_SAMPLES

        return {"path": str(self.target.path), "step": self.target.step, "engine": self.engine,
                "settings": self.args.settings, "chat": self.args.chat, "stop": self.args.stop,
                "samples": self.args.samples, "samples_a_call": CALL_SAMPLES,
                "sampling": asdict(self.sampling), "batch_size": self.args.batch_size,
                "files": fingerprint(self.target.path)}

    @cached_property
    def responses(self) -> dict[str, Any]:
        """What the responses depend on."""
        source = self.args.input or self.args.sampled
        return {"model": self.model, "rows": {"path": str(source), "digest": file_digest(source)}}

    @property
    def whole(self) -> dict[str, Any]:
        """What every byte of the artifact depends on."""
        return {**self.responses, "right_from": self.args.right_from, "k": sorted(set(self.args.k)),
                "group_by": self.group_by, "reward": {"name": self.order.name, "version": self.reward.version,
                                                      "settings": dict(self.order.settings)}}

    @property
    def sampled_file(self) -> Path:
        """Where responses stand until they are judged; its name tells on what they depend."""
        from megatron_sov.convert.resume import partial_folder

        digest = hashlib.sha256(json.dumps(self.responses, sort_keys=True).encode()).hexdigest()[:16]
        return partial_folder(behind_links(self.args.output)) / f"sampled-{digest}.jsonl"


def run_passk(args: argparse.Namespace, events: RunEvents) -> int:
    """Sample and judge what is not there yet, and estimate; the output appears when all is done.

    Raises:
        UserError: what is asked for contradicts itself, bad rows, or nothing can be written there.
    """
    plan = _checked(args)
    if not is_first():  # of a torchrun, or of ranks that run this command again
        if plan.target is not None:
            _sample(plan)
        return ExitCode.OK
    from megatron_sov.convert.resume import resumable_artifact

    # nothing that was paid for is lost with an error: a judge's limit of cost, an engine's lack of memory
    with resumable_artifact(args.output, KIND, plan.whole, overwrite=args.overwrite,
                            kills=(Exception,)) as artifact:
        responses = args.sampled if plan.target is None else _sample(plan)
        figures = _judge(plan, responses, artifact.path)
        artifact.writer.content = figures
        artifact.writer.settings = plan.whole
        if plan.target is not None and (plan.target.path / MANIFEST).is_file():
            artifact.writer.add_input(plan.target.path)
    step = events.last_step() if plan.target is None or plan.target.step is None else plan.target.step
    events.add(KIND, step=step, input=str(args.input or args.sampled), reward=plan.order.name,
               reward_version=plan.reward.version, sampling=plan.model and plan.model["sampling"], **figures)
    from megatron_sov.eval.judged_samples import table

    print(to_json(figures).rstrip() if args.json
          else f"{table(figures)}\n{args.output}: reward {plan.order.name} {plan.reward.version}")
    return ExitCode.OK


def _checked(args: argparse.Namespace) -> _Plan:
    if (args.sampled is None) == (args.target is None) or (args.input is None) == (args.sampled is None):
        raise UserError("pass TARGET and --input PROMPTS.jsonl, or --sampled ROWS.jsonl alone")
    sampling = checked_sampling(args)
    asked = order(args.reward, parse_nested(args.reward_set, "--reward-set"))
    made = make(asked)
    if args.sampled is None:
        check_rows(args.input, field=PROMPT)
    else:
        group_by = _grouped_by(args.sampled, args.group_by)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    if args.sampled is not None:
        return _Plan(args, asked, made, sampling, None, group_by)
    from megatron_sov.generate.target import find_target

    return _Plan(args, asked, made, sampling, find_target(args.target))


def checked_sampling(args: argparse.Namespace) -> Sampling:
    """Return how responses are sampled.

    Raises:
        UserError: the arguments contradict themselves.
    """
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    rules = [(args.samples >= 1, f"--samples {args.samples}: must be at least 1"),
             (min(args.k, default=1) >= 1, f"--k {min(args.k, default=1)}: must be at least 1"),
             (getattr(args, "sampled", None) or max(args.k, default=1) <= args.samples,
              f"--k {max(args.k, default=1)}: is more than --samples {args.samples}"),
             (args.temperature or args.samples == 1,
              f"--samples {args.samples} at --temperature 0 are the same response again and again; raise the "
              "temperature, or take one sample"),
             (math.isfinite(args.right_from), f"--right-from {args.right_from}: must be a finite number"),
             (args.workers >= 1, f"--workers {args.workers}: must be at least 1"),
             ("" not in args.stop, "--stop '': must hold at least one character")]
    problems = [*(said for holds, said in rules if not holds), *sampling.problems(),
                *Batching(args.batch_size).problems()]
    if problems:
        raise UserError(str(problems[0]))
    return sampling


def _grouped_by(file: Path, asked: str | None) -> str:
    """Return the field that tells the prompts of sampled rows apart.

    Raises:
        UserError: bad rows, one without that field, or two of different problems that have it in common.
    """
    check_rows(file, "--sampled")
    group_by = asked or ""
    first: dict[str, tuple[int, dict[str, str]]] = {}
    for line, row in read_rows(file, "--sampled"):
        group_by = group_by or (PROMPT_INDEX if PROMPT_INDEX in row else PROMPT)
        if group_by not in row:
            raise UserError(f"--sampled {file}: line {line} has no {group_by!r}, by which the responses to "
                            "one prompt are known; name the field that they share with --group-by")
        problem = {name: _digest(row[name]) for name in OF_A_PROBLEM if row.get(name) is not None}
        first_line, known = first.setdefault(_digest(row[group_by]), (line, {}))
        differs = next((name for name in problem if known.get(name, problem[name]) != problem[name]), None)
        if differs is not None:
            raise UserError(f"--sampled {file}: lines {first_line} and {line} have one {group_by!r} and "
                            f"differ in {differs!r}, so they answer two problems; name a field that tells "
                            "problems apart with --group-by")
        known.update(problem)
    return group_by


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sample(plan: _Plan) -> Path:
    """Return the file with all responses, of which an engine writes what is not there yet."""
    from megatron_sov.eval.sampling import write_responses

    args, target, file = plan.args, plan.target, plan.sampled_file
    assert target is not None
    num_done = journal.num_kept(file, plan.responses)
    if file.exists():  # asked behind the count: the first process may publish in between
        return file
    sampled = _sampled(plan)
    longest = sampled.asked.longest + args.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(plan.engine, target, args.settings, args.nproc)
    if num_done == sampled.num_responses and not is_first():
        return file  # no process has anything to ask, the first one publishes

    def work(engine: Engine) -> int:
        if not is_first():
            return write_responses(sampled, engine, num_done, lambda lines: None)
        kept = journal.Journal(journal.folder_of(file), file, num_done)
        with work_bar("sample", sampled.num_responses, "response") as bar:
            bar.update(num_done)

            def write(lines: list[bytes]) -> None:
                kept.add(lines)
                bar.update(len(lines))

            try:
                return write_responses(sampled, engine, num_done, write)
            finally:
                kept.close()

    def ask() -> None:
        run_engine(plan.engine, target, work, longest=longest, batching=Batching(args.batch_size),
                   settings=args.settings, nproc=args.nproc)

    if not is_first():
        ask()
        return file
    with journal.opened(file, plan.responses) as kept:
        if num_done:
            print(f"{num_done:,} responses were sampled by an earlier command and are kept", file=sys.stderr)
        if num_done < sampled.num_responses:
            ask()
        kept.publish()
    return file


def _sampled(plan: _Plan) -> Sampled:
    """Return what an engine is asked for."""
    from megatron_sov.eval.sampling import Sampled

    assert plan.target is not None
    rows = [dict(row) for _, row in read_rows(plan.args.input, field=PROMPT)]
    asked = asked_of(plan.target, [_prompt(row[PROMPT]) for row in rows], plan.args.chat)
    empty = [i for i, ids in enumerate(asked.ids) if not ids]
    if empty:
        raise UserError(f"--input {plan.args.input}: prompt {empty[0] + 1} is empty; write at least one "
                        "character")
    return Sampled(rows, asked, plan.args.samples, plan.sampling,
                   Stop(asked.end_ids, tuple(plan.args.stop), asked.decode))


def _prompt(value: Any) -> str | Conversation:
    if isinstance(value, str):
        return value
    try:
        return Conversation(read_messages(value, PROMPT))
    except BadRecord as e:
        raise UserError(f"--input: a prompt {e}") from None


def _judge(plan: _Plan, responses: Path, folder: Path) -> dict[str, Any]:
    """Judge the responses into an artifact's folder, and return the figures."""
    from megatron_sov.eval.judged_samples import read_judged

    scored = folder.parent / "scored.jsonl"
    with work_bar("score", check_rows(responses, "--sampled"), "row") as bar:
        summary = score_file(plan.order, plan.reward, responses, scored, plan.args.workers, bar.update)
    for told in summary.tally.told:
        print(visible(told), file=sys.stderr)
    figures = read_judged(scored, plan.group_by, plan.args.right_from).figures(plan.args.k)
    os.replace(scored, folder / SAMPLES)
    (folder / RESULTS).write_text(to_json({**plan.whole, **figures}), encoding="utf-8")
    return figures
