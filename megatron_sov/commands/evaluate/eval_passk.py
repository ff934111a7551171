"""`megatron-sov eval passk` and `eval pairs`: a reward judges a model's responses, which goes on behind a
kill; or the model ranks the two answers of held-out pairs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.artifacts import MANIFEST, format_json
from megatron_sov.base.digests import fingerprint_folder, hash_file
from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import ExitCode, UserError, escape_controls
from megatron_sov.base.outputs import resolve_link
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import (
    AtLeastOne, Finite, Flag, ProblemCode, SettingsProblem, build_command, parse_nested, read_options)
from megatron_sov.commands.evaluate.task import (
    HeldoutOptions, OutOptions, begin_task, measure_target, show_figures, write_figures)
from megatron_sov.commands.score import JudgeOptions, RewardName, RewardSet
from megatron_sov.commands.shared_options import (
    ModelPath, OverwriteOptions, RecordOptions, RedoOptions, get_target_step)
from megatron_sov.infer.engine import ChosenEngine, Engine, choose_engine, run_with_engine
from megatron_sov.infer.prompts import EncodedPrompts, check_engine, check_length, encode_prompts
from megatron_sov.infer.request import (
    Batching, BatchSize, RankOptions, ResponseSampling, StopRule, Temperature)
from megatron_sov.judge.rewards.registry import MadeReward, make, order
from megatron_sov.judge.rewards.scoring import score_file
from megatron_sov.model.config import parse_data_paths
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.work.progress.jobs import Job, local_executor, run_job
from megatron_sov.work.progress.journal import list_finished_items, work_folder
from megatron_sov.work.progress.progress_bar import create_bar

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target


KIND = "passk"
RESULTS, SAMPLES = "results.json", "samples.jsonl"
"""Files of the artifact: the figures, and every response with its reward."""
PROMPT, PROMPT_INDEX = "prompt", "prompt_index"
CALL_SAMPLES = 1024
"""Responses that an engine is asked for at a time, and lost at most when the command is killed."""


@dataclass(frozen=True)
class JudgedSampling(ResponseSampling):
    """How each token of a judged response is chosen."""

    max_new_tokens: AtLeastOne = 1024
    """Longest response."""
    temperature: Temperature = 1.0


@dataclass(frozen=True, kw_only=True)
class JudgedSamplingOptions(JudgeOptions):
    """How responses are sampled and judged, but for the sizes of the draws."""

    reward: RewardName
    reward_set: RewardSet = ()
    right_from: Annotated[Finite, Flag(value="R")] = 1.0
    """Least reward of a right response."""
    samples: AtLeastOne = 8
    """Responses to each prompt."""
    sampling: JudgedSampling = field(default_factory=JudgedSampling)
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends a response; repeat it."""
    chat: bool = False
    """Frame each prompt by the chat template."""
    engine: ChosenEngine = None
    batch_size: BatchSize = Batching.batch_size

    def problems(self) -> list[SettingsProblem]:
        return [] if self.samples == 1 or self.sampling.temperature else [
            SettingsProblem(ProblemCode.RULE, "samples",
                            "are the same response again and again at --temperature 0",
                            self.samples, "raise the temperature, or take one sample")]


@dataclass(frozen=True, kw_only=True)
class EvalPasskOptions(JudgedSamplingOptions, RecordOptions, RankOptions, OverwriteOptions,
                       RedoOptions):
    """Sample responses to prompts, have a reward judge them, estimate pass@k and maj@k."""

    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (its newest one) or Hugging Face folder that answers --input."""
    input: Annotated[Path, Flag(value="PROMPTS.jsonl")]
    """A JSON object per line, with `prompt` (text, or messages with --chat) and what the reward needs."""
    k: Annotated[tuple[AtLeastOne, ...], Flag(value="K", many=True)] = ()
    """Sizes of the draws (default 1, 2, 4, ... up to the fewest scored samples of a prompt)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to make: the figures, and every response with its reward."""

    def problems(self) -> list[SettingsProblem]:
        p = super().problems()
        if max(self.k, default=1) > self.samples:
            p.append(SettingsProblem(ProblemCode.RULE, "k", f"is more than --samples {self.samples}",
                                     max(self.k)))
        return p


@dataclass(frozen=True)
class _Plan:
    args: EvalPasskOptions
    order: PluginRequest
    reward: MadeReward
    target: Target

    @property
    def engine(self) -> str:
        return self.args.engine or choose_engine(self.target)

    @cached_property
    def model(self) -> dict[str, Any]:
        """Values on which the responses depend."""
        return {"path": str(self.target.path), "step": self.target.step, "engine": self.engine,
                "settings": list(self.args.settings), "chat": self.args.chat, "stop": list(self.args.stop),
                "samples": self.args.samples, "samples_a_call": CALL_SAMPLES,
                # and the batch size: an engine may round otherwise in another batch, and samples then differ
                "sampling": asdict(self.args.sampling), "batch_size": self.args.batch_size,
                "files": fingerprint_folder(self.target.path)}

    @cached_property
    def responses(self) -> dict[str, Any]:
        source = self.args.input
        return {"model": self.model, "rows": {"path": str(source), "digest": hash_file(source)}}

    @property
    def whole(self) -> dict[str, Any]:
        """What every byte of the artifact depends on."""
        return {**self.responses, "right_from": self.args.right_from, "k": sorted(set(self.args.k)),
                "reward": {"name": self.order.name, "version": self.reward.version,
                           "settings": dict(self.order.settings)}}

    @property
    def sampled_file(self) -> Path:
        """Where responses stand until they are judged; its name tells on what they depend."""
        # another model, sampling or file of prompts makes another name: responses are never mixed
        digest = hashlib.sha256(json.dumps(self.responses, sort_keys=True).encode()).hexdigest()[:16]
        return work_folder(resolve_link(self.args.output)) / f"sampled-{digest}.jsonl"


def run_passk(args: EvalPasskOptions) -> int:
    """Sample and judge what is not there yet, and estimate; the output appears when all is done.

    Raises:
        UserError: what is asked for contradicts itself, bad rows, or nothing can be written there.
    """
    events = RunEvents(args.run)
    check_model_path(args.target)
    # Everything that can be refused is refused before a model is loaded.
    plan = _checked(args)
    if not is_first_rank():  # of a torchrun, or of ranks that run this command again
        _sample(plan)
        return ExitCode.OK
    from megatron_sov.work.progress.resumable import resumable_artifact

    # The artifact appears whole; responses stay next to it until then.
    with resumable_artifact(args.output, KIND, "megatron-sov eval passk", plan.responses,
                            overwrite=args.overwrite, redo=args.redo) as artifact:
        figures = _judge(plan, _sample(plan), artifact.path)
        artifact.writer.content = figures
        artifact.writer.settings = plan.whole
        if (plan.target.path / MANIFEST).is_file():
            artifact.writer.add_input(plan.target.path)
    events.add(KIND, step=get_target_step(plan.target, events), input=str(args.input), reward=plan.order.name,
               reward_version=plan.reward.version, sampling=plan.model["sampling"], **figures)
    from megatron_sov.eval.pass_at_k import format_table

    print(format_json(figures).rstrip() if args.json
          else f"{format_table(figures)}\n{args.output}: reward {plan.order.name} {plan.reward.version}")
    return ExitCode.OK


def _checked(args: EvalPasskOptions) -> _Plan:
    asked = order(args.reward, parse_nested(args.reward_set, "--reward-set"))
    made = make(asked)
    # Rows are checked before Megatron is imported, which takes seconds.
    check_rows(args.input, field=PROMPT)
    from megatron_sov.infer.engines.target import find_target

    return _Plan(args, asked, made, find_target(args.target))


def _sample(plan: _Plan) -> Path:
    """Return the file with all responses, of which an engine writes what is not there yet."""
    args, target, file, identity = plan.args, plan.target, plan.sampled_file, plan.responses
    # read before the file is looked for, see below
    done = list_finished_items(file, identity)
    if file.exists():  # asked behind what is done: the first process may publish in between
        return file
    rows = [dict(row) for _, row in read_rows(args.input, field=PROMPT)]
    asked = encode_prompts(target, [_prompt(row[PROMPT]) for row in rows], args.chat)
    # no engine can continue nothing
    if empty := [i for i, ids in enumerate(asked.ids, 1) if not ids]:
        raise UserError(f"--input {args.input}: prompt {empty[0]} is empty; write at least one character")
    longest = asked.longest + args.sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(plan.engine, target, args.settings, args.nproc)
    # an engine whose samples depend on their batch meets the same batches behind a kill
    size = max(1, CALL_SAMPLES // args.samples)
    calls = [range(len(rows))[begin:begin + size] for begin in range(0, len(rows), size)]

    def work(engine: Engine | None) -> None:
        def ask(prompts: range) -> bytes:
            assert engine is not None
            return _responses(args, rows, asked, prompts, engine)

        if not is_first_rank():  # of the ranks of a model: the first one keeps what all say
            for prompts in (prompts for number, prompts in enumerate(calls) if number not in done):
                ask(prompts)
            return
        with create_bar("sample", len(rows) * args.samples, "response") as bar:
            run_job(Job(made_by="megatron-sov eval passk", output=file, identity=identity, items=calls,
                        do=local_executor(ask), sink=lambda journal: journal.write_payloads(file),
                        done=lambda prompts: bar.update(len(prompts) * args.samples)))

    if done and is_first_rank():
        num_done = sum(len(calls[int(number)]) for number in done) * args.samples
        print(f"{num_done:,} responses were sampled by an earlier command and are kept", file=sys.stderr)
    # an engine is loaded only where something is left to ask
    if len(done) < len(calls):
        run_with_engine(plan.engine, target, work, longest=longest, batching=Batching(args.batch_size),
                        settings=args.settings, nproc=args.nproc)
    elif is_first_rank():  # else no process has anything to ask, and the first one publishes
        work(None)
    return file


def _responses(args: EvalPasskOptions, rows: list[dict[str, Any]], asked: EncodedPrompts, prompts: range,
               engine: Engine) -> bytes:
    """Return the rows of all responses to some prompts, those to one together.  Each has random numbers of
    its own, by its place among all."""
    stop = StopRule(asked.end_ids, tuple(args.stop), asked.decode)
    # prompt by prompt, so that equal prompts are neighbours in a batch
    places = [(i, sample) for i in prompts for sample in range(args.samples)]
    found = engine.generate([asked.ids[i] for i, _ in places], args.sampling, stop=stop,
                            # a stream for each response, however many are asked at once
                            streams=[i * args.samples + sample for i, sample in places])
    made = [{**rows[i], PROMPT_INDEX: i, "sample": sample,
             "response": asked.response(i, stop.truncate_text(asked.decode(tokens))),
             "num_tokens": len(tokens), "finish_reason": reason}
            for (i, sample), tokens, reason in zip(places, found.continuations, found.finish_reasons,
                                                   strict=True)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in made)


def _prompt(value: Any) -> str | Conversation:
    if isinstance(value, str):
        return value
    try:
        return Conversation(parse_messages(value, PROMPT))
    except BadRecord as e:
        raise UserError(f"--input: a prompt {e}") from None


def _judge(plan: _Plan, responses: Path, folder: Path) -> dict[str, Any]:
    """Judge the responses into an artifact's folder, and return the figures."""
    from megatron_sov.eval.pass_at_k import read_scored_responses

    scored = folder.parent / "scored.jsonl"
    with create_bar("score", check_rows(responses, "--input"), "row") as bar:
        summary = score_file(plan.order, plan.reward, responses, scored, plan.args.workers, bar.update,
                             redo=True)  # what was judged otherwise is of no use
    for told in summary.tally.told:
        print(escape_controls(told), file=sys.stderr)
    figures = read_scored_responses(scored, PROMPT_INDEX, plan.args.right_from).figures(plan.args.k)
    # within the artifact under way, so nothing half-written is visible
    os.replace(scored, folder / SAMPLES)
    (folder / RESULTS).write_text(format_json({**plan.whole, **figures}), encoding="utf-8")
    return figures


@dataclass(frozen=True, kw_only=True)
class PairsOptions(HeldoutOptions, OutOptions, RankOptions):
    """Share of held-out pairs whose better answer the model would rather write."""

    target: ModelPath


def run_pairs(args: PairsOptions) -> int:
    events = begin_task(args, args.target, out=args.out)
    from megatron_sov.chat.vocabulary import check_same_tokens
    from megatron_sov.eval.heldout_loss import compute_rows_per_batch
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.preference import CHOSEN_LIKELIER, HELDOUT_PAIRS, measure_pairs
    from megatron_sov.post.reference import score_documents, score_documents_by_hf
    from megatron_sov.train.data.token_shards import open_sources, tokenizer_folder

    target = find_target(args.target)
    seq_len = args.seq_len or target.trained_tokens
    sources = open_sources(parse_data_paths(args.data), target.vocab_size, ("preference",))
    check_same_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    if not any(s.num_tokens.get("heldout") for s in sources):
        raise UserError(f"--data {', '.join(args.data)}: holds no pairs out, so there is nothing to judge "
                        "by; pack with --heldout 0.02")

    def of_policy(loaded: Any) -> dict[str, Any]:
        size = compute_rows_per_batch(loaded, seq_len)
        return measure_pairs(sources, lambda documents, chosen: score_documents(
            loaded, documents, chosen, seq_len, size), seq_len)

    def of_hf(model: Any) -> dict[str, Any]:
        return measure_pairs(sources, lambda documents, chosen: score_documents_by_hf(
            model, documents, chosen, seq_len), seq_len)

    found = measure_target(args, target, of_policy, of_hf)
    if found is not None:
        write_figures(args.out, found)
        for source, figures in found.items():
            events.add(HELDOUT_PAIRS, step=get_target_step(target, events), source=source, **figures)
        show_figures(args.json, found, "\n".join(
            f"{source}: chosen likelier than rejected in {100 * r[CHOSEN_LIKELIER]:.1f} % of "
            f"{r['pairs']:,} pairs"
            for source, r in found.items()))
    return ExitCode.OK


PASSK = build_command(EvalPasskOptions, lambda typed: run_passk(read_options(EvalPasskOptions, typed)))
PAIRS = build_command(PairsOptions, lambda typed: run_pairs(read_options(PairsOptions, typed)))
