"""Runs `megatron-sov eval passk`: samples and judges responses and estimates pass@k. A repeated command
resumes after a kill."""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, format_json
from megatron_sov.base.digests import fingerprint_folder, hash_file
from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.outputs import resolve_link
from megatron_sov.commands.evaluate.eval_passk import PROMPT, EvalPasskOptions, PasskRequest
from megatron_sov.commands.shared_options import get_target_step
from megatron_sov.eval.pass_at_k import format_table, read_scored_responses
from megatron_sov.infer.engine import Engine, check_engine, choose_engine, run_with_engine
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.prompts import EncodedPrompts, check_length, encode_prompts
from megatron_sov.infer.request import Batching, StopRule
from megatron_sov.judge.rewards.scoring import score_file
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.work.progress.jobs import Job, local_executor, run_job
from megatron_sov.work.progress.journal import list_finished_items, work_folder
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.progress.resumable import resumable_artifact

KIND = "passk"
RESULTS, SAMPLES = "results.json", "samples.jsonl"
"""Files in the artifact: the figures, and the responses with rewards."""
PROMPT_INDEX = "prompt_index"
BATCHES_PER_CALL = 4
"""Batches of responses per engine call; a kill loses at most one call."""


@dataclass(frozen=True)
class PasskRun:
    """A request with the loaded target, and the settings that identify its responses and figures."""

    request: PasskRequest
    target: Target

    @property
    def options(self) -> EvalPasskOptions:
        return self.request.options

    @property
    def engine(self) -> str:
        return self.options.engine or choose_engine(self.target)

    @cached_property
    def model(self) -> dict[str, Any]:
        """Model and sampling settings, which determine the responses."""
        options = self.options
        return {"path": str(self.target.path), "step": self.target.step, "engine": self.engine,
                "settings": list(options.settings), "chat": options.chat, "stop": list(options.stop),
                "samples": options.samples, "samples_a_call": BATCHES_PER_CALL * options.batch_size,
                # the batch size may change an engine's rounding
                "sampling": asdict(options.sampling), "batch_size": options.batch_size,
                "files": fingerprint_folder(self.target.path)}

    @cached_property
    def responses(self) -> dict[str, Any]:
        """`model` and the input file, which determine the sampled responses."""
        source = self.options.input
        return {"model": self.model, "rows": {"path": str(source), "digest": hash_file(source)}}

    @property
    def artifact_settings(self) -> dict[str, Any]:
        """`responses` with the reward and --k, which determine the figures."""
        request = self.request
        return {**self.responses, "right_from": self.options.right_from, "k": sorted(set(self.options.k)),
                "reward": {"name": request.order.name, "version": request.reward.version,
                           "settings": dict(request.order.settings)}}

    @property
    def sampled_file(self) -> Path:
        """File with unjudged responses. Its name contains a hash of `responses`, so that responses from
        different models or prompts never mix."""
        digest = hashlib.sha256(json.dumps(self.responses, sort_keys=True).encode()).hexdigest()[:16]
        return work_folder(resolve_link(self.options.output)) / f"sampled-{digest}.jsonl"


def estimate_passk(request: PasskRequest) -> None:
    """Sample and judge missing responses, then write the artifact and print the estimates."""
    run = PasskRun(request, find_target(request.options.target))
    options = run.options
    # further ranks, started by torchrun or by the same command, only sample
    if not is_first_rank():
        _sample(run)
        return
    with resumable_artifact(options.output, KIND, "megatron-sov eval passk", run.responses,
                            overwrite=options.overwrite, redo=options.redo) as artifact:
        figures = _judge(run, _sample(run), artifact.path)
        artifact.writer.content = figures
        artifact.writer.settings = run.artifact_settings
        if (run.target.path / MANIFEST).is_file():
            artifact.writer.add_input(run.target.path)
    name, version = request.order.name, request.reward.version
    request.events.add(KIND, step=get_target_step(run.target, request.events), input=str(options.input),
                       reward=name, reward_version=version, sampling=run.model["sampling"], **figures)
    if options.json:
        print(format_json(figures).rstrip())
    else:
        print(f"{format_table(figures)}\n{options.output}: reward {name} {version}")


def _sample(run: PasskRun) -> Path:
    """Sample missing responses and return the file with all responses."""
    options, target, file, identity = run.options, run.target, run.sampled_file, run.responses
    # before `file.exists()`: the first rank may publish the file in between
    finished_calls = list_finished_items(file, identity)
    if file.exists():
        return file
    rows = [dict(row) for _, row in read_rows(options.input, field=PROMPT)]
    prompts = encode_prompts(target, [_parse_prompt(row[PROMPT]) for row in rows], options.chat)
    if empty := [number for number, ids in enumerate(prompts.ids, 1) if not ids]:
        raise UserError(f"--input {options.input}: prompt {empty[0]} is empty; write at least one character")
    longest = prompts.longest + options.sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(run.engine, target, options.settings, options.nproc)
    # fixed calls: in some engines, samples depend on the batch; a resumed command needs equal batches
    prompts_per_call = max(1, BATCHES_PER_CALL * options.batch_size // options.samples)
    calls = [range(len(rows))[begin:begin + prompts_per_call]
             for begin in range(0, len(rows), prompts_per_call)]

    def work(engine: Engine | None) -> None:
        def generate(indices: range) -> bytes:
            assert engine is not None
            return _generate_rows(options, rows, prompts, indices, engine)

        if not is_first_rank():  # rank 0 writes the responses
            for number, indices in enumerate(calls):
                if number not in finished_calls:
                    generate(indices)
            return
        with create_bar("sample", len(rows) * options.samples, "response") as bar:
            run_job(Job(made_by="megatron-sov eval passk", output=file, identity=identity, items=calls,
                        do=local_executor(generate), sink=lambda journal: journal.write_payloads(file),
                        done=lambda indices: bar.update(len(indices) * options.samples)))

    if finished_calls and is_first_rank():
        num_finished = sum(len(calls[int(number)]) for number in finished_calls) * options.samples
        print(f"{num_finished:,} responses were already sampled", file=sys.stderr)
    # without missing calls no engine is needed: rank 0 only publishes
    if len(finished_calls) < len(calls):
        run_with_engine(run.engine, target, work, longest=longest, batching=Batching(options.batch_size),
                        settings=options.settings, nproc=options.nproc)
    elif is_first_rank():
        work(None)
    return file


def _generate_rows(options: EvalPasskOptions, rows: list[dict[str, Any]], prompts: EncodedPrompts,
                   indices: range, engine: Engine) -> bytes:
    """Sample `options.samples` responses per prompt and format them as JSON lines, prompt by prompt."""
    stop = StopRule(prompts.end_ids, tuple(options.stop), prompts.decode)
    # equal prompts are neighbours in a batch
    samples = [(i, sample) for i in indices for sample in range(options.samples)]
    # random streams per response do not depend on the call
    streams = [i * options.samples + sample for i, sample in samples]
    result = engine.generate([prompts.ids[i] for i, _ in samples], options.sampling, stop=stop,
                             streams=streams)
    lines = []
    for (i, sample), tokens, reason in zip(samples, result.continuations, result.finish_reasons, strict=True):
        response = prompts.response(i, stop.truncate_text(prompts.decode(tokens)))
        row = {**rows[i], PROMPT_INDEX: i, "sample": sample, "response": response,
               "num_tokens": len(tokens), "finish_reason": reason}
        lines.append(json.dumps(row).encode() + b"\n")
    return b"".join(lines)


def _parse_prompt(value: Any) -> str | Conversation:
    if isinstance(value, str):
        return value
    try:
        return Conversation(parse_messages(value, PROMPT))
    except BadRecord as e:
        raise UserError(f"--input: a prompt {e}") from None


def _judge(run: PasskRun, responses: Path, folder: Path) -> dict[str, Any]:
    """Judge the responses, write the artifact's files to `folder`, and return the figures."""
    request, options = run.request, run.options
    scored = folder.parent / "scored.jsonl"
    # `redo`: rewards from different settings are useless
    with create_bar("score", check_rows(responses, "--input"), "row") as bar:
        summary = score_file(request.order, request.reward, source=responses, output=scored,
                             workers=options.workers, progress=bar.update, redo=True)
    for message in summary.tally.examples:
        print(escape_controls(message), file=sys.stderr)
    figures = read_scored_responses(scored, PROMPT_INDEX, options.right_from).figures(options.k)
    # the artifact's folder is still private
    os.replace(scored, folder / SAMPLES)
    (folder / RESULTS).write_text(format_json({**run.artifact_settings, **figures}), encoding="utf-8")
    return figures
