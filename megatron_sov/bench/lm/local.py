"""Requests answered by a model in this process, or on processes that are started for it, chunk by chunk: by
one on Megatron-Core at any layout, by transformers' model, or by vLLM's.

Chunks follow from the requests alone, so that an evaluation that goes on behind a kill asks the engine for
the same batches.  Each chunk's answers are on disk before the next one is asked for.  Several evaluations of
one model with one cache share its chunks (`Answers.deal`); at the end every one of them has all answers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.answers import Answer, Answers, AnswerScore, Request, Write, readings
from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.language_model import prepare_head_input
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.eval.heldout_loss import ROW_TOKENS, group_into_rows
from megatron_sov.infer.engine import MEGATRON, SERVER_ENGINES, run_with_engine
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.request import (
    LENGTH, STOP, Batching, GenerationBounds, GenerationResult, Sampling, StopRule, Tokens)
from megatron_sov.work.processes.stop_signals import StopFlag
from megatron_sov.work.progress.progress_bar import create_bar

CHUNK_ROWS, CHUNK_BATCHES = 4, 4
"""Rows of tokens that are read for likelihoods, and batches of sequences, that a chunk has at most for each
process with data of its own."""
LOGITS_BYTES = 1 << 29
"""Logits that transformers' model is asked for at a time, unless one document alone has more."""
Group = Sequence[AnswerScore]
"""Scores for which the same tokens are read."""


@dataclass(frozen=True)
class LocalEvaluation:
    target: Target
    engine: str
    """One of `infer.engine.ENGINES`."""
    settings: tuple[str, ...]
    """`key=value` changes of layout and precision (megatron)."""
    nproc: int | None
    """Local processes (megatron)."""
    batching: Batching
    end_ids: tuple[int, ...]
    """Tokens that end a continuation."""
    special_ids: dict[str, int]
    """Special tokens by their text: as a stop string such a token would never show in the text."""
    decode: Callable[[list[int]], str]
    """From token ids to text, without special tokens."""


@dataclass(frozen=True)
class _Model:
    """What answers; where it runs on several processes, called by all of them together."""

    generate: Callable[..., GenerationResult]
    score: Callable[[Sequence[Group]], dict[str, Answer]]
    """Returns the answers to groups of scores."""
    num_shares: int = 1
    """Processes with sequences of their own."""


def answer_locally(running: LocalEvaluation, requests: Sequence[Request], kept: Path | None,
                   flag: StopFlag) -> bool:
    """Have a model answer what is not answered yet; returns whether it was asked to stop early.

    Every process of a torchrun or Slurm job calls it; only the first one has requests and the folder in which
    answers are kept.
    """
    if running.engine == MEGATRON:
        from megatron_sov.engine.parallel.values import broadcast_object
        from megatron_sov.infer.decoder.generator import MegatronEngine

        def on_ranks(loaded: LoadedModel) -> bool:
            engine = MegatronEngine(loaded.policy, running.batching)

            def generate(prompts: Sequence[Tokens], sampling: Sampling, **more: Any) -> GenerationResult:
                # those that are not whole may be cut off
                bounds = GenerationBounds([sampling.max_new_tokens] * len(prompts),
                                          lambda: flag.reason is not None)
                return engine.generate(prompts, sampling, bounds=bounds, **more)

            model = _Model(generate, partial(of_forward_model, loaded), collectives.get_data_rank()[1])
            return _answer(model, running, broadcast_object(requests),
                           kept if loaded.world.is_main else None, flag)

        return bool(run_forward_model(running.target, list(running.settings), running.nproc, on_ranks))
    if running.engine in SERVER_ENGINES:
        if any(isinstance(request, AnswerScore) for request in requests):
            raise UserError(f"--engine {running.engine}: tells no likelihoods, which these tasks compare; "
                            "leave it out")
        longest = max(len(r.prompt) + r.max_tokens for r in requests if isinstance(r, Write))
        return bool(run_with_engine(running.engine, running.target, lambda engine: _answer(
            _Model(engine.generate, lambda groups: {}), running, requests, kept, flag), longest=longest,
            batching=running.batching))
    from megatron_sov.infer.engines.transformers_engine import HfEngine, load_configured_hf

    hf = load_configured_hf(running.target.path, running.settings)
    model = _Model(HfEngine(hf, running.batching).generate, partial(of_hf_model, hf))
    return _answer(model, running, requests, kept, flag)


def _answer(model: _Model, running: LocalEvaluation, requests: Sequence[Request], kept: Path | None,
            flag: StopFlag) -> bool:
    """Answer requests that are not answered yet, on all processes; the one with a folder keeps them.

    Returns:
        Whether it was asked to stop before all were answered.
    """
    from megatron_sov.engine.parallel.world import run_on_first

    # All processes cut the same chunks from the same requests; the first one says which is next.
    chunks = list(chunks_of(requests, model.num_shares, running.batching))
    begin_s, num_read, num_answered = time.monotonic(), 0, 0
    deal: Iterator[tuple[int, list[int]]] = iter(())
    with contextlib.ExitStack() as stack:
        if kept is not None:
            answers = stack.enter_context(contextlib.closing(Answers(kept)))
            deal = stack.enter_context(contextlib.closing(
                answers.deal(chunks, lambda: flag.reason is not None)))
        bar = stack.enter_context(create_bar("ask", len(requests), "request", kept is not None))
        while (step := run_on_first(lambda: next(deal, None))) is not None:
            asked = [chunks[step[0]][i] for i in step[1]]
            found = _chunk_answers(model, running, asked, flag) if asked else {}
            num_read, num_answered = num_read + sum(map(num_tokens, asked)), num_answered + len(found)
            if kept is not None:
                # On disk before the next chunk is asked for: a kill loses one chunk at most.
                answers.keep(found)
            bar.update(len(found))
    if kept is not None:
        print(f"asked {num_answered:,} requests with {num_read:,} tokens in "
              f"{time.monotonic() - begin_s:.1f} s", file=sys.stderr)
    return bool(run_on_first(lambda: flag.reason is not None))


def num_tokens(request: Request) -> int:
    return len(request.read) + 1 if isinstance(request, AnswerScore) else len(request.prompt)


def chunks_of(requests: Sequence[Request], num_shares: int, batching: Batching) -> Iterator[list[Request]]:
    """Yield requests that are answered before anything is written down: likelihoods from the longest, then
    continuations that an engine can be asked for together."""
    limit, size = CHUNK_ROWS * ROW_TOKENS * num_shares, CHUNK_BATCHES * batching.batch_size * num_shares
    tokens = count = 0
    chunk: list[Request] = []
    for group in readings([r for r in requests if isinstance(r, AnswerScore)]):
        # A group is never cut: its answers come of one reading.
        if chunk and (tokens + len(group[0].read) > limit or count == size):
            yield chunk
            tokens, count, chunk = 0, 0, []
        tokens, count = tokens + len(group[0].read), count + 1
        chunk.extend(group)
    if chunk:
        yield chunk
    alike: dict[Any, list[Request]] = {}
    for request in requests:
        if isinstance(request, Write):
            alike.setdefault(request.sampling, []).append(request)
    for group_ in alike.values():
        yield from (group_[begin:begin + size] for begin in range(0, len(group_), size))


def _chunk_answers(model: _Model, running: LocalEvaluation, chunk: Sequence[Request],
                   flag: StopFlag) -> dict[str, Answer]:
    scores = [r for r in chunk if isinstance(r, AnswerScore)]
    if scores:
        return model.score(readings(scores))
    writes = [r for r in chunk if isinstance(r, Write)]
    first = writes[0]
    # a special token never shows in decoded text, so it has to stop by its id
    special = [running.special_ids[text] for text in first.until if text in running.special_ids]
    stop = StopRule((*running.end_ids, *special),
                    tuple(text for text in first.until if text not in running.special_ids), running.decode)
    sampling = Sampling(first.max_tokens, first.temperature, first.top_k, first.top_p, first.seed)
    prompts = [[int(token) for token in write.prompt] for write in writes]
    found = model.generate(prompts, sampling, stop=stop, streams=[w.stream for w in writes])
    answers: dict[str, Answer] = {}
    for write, tokens, reason in zip(writes, found.continuations, found.finish_reasons, strict=True):
        # others were cut off by a wish to stop
        if reason == STOP or len(tokens) >= write.max_tokens or flag.reason is None:
            answers[write.key] = {"text": stop.truncate_text(running.decode(tokens)),
                                  "finish_reason": STOP if reason == STOP else LENGTH}
    return answers


def of_forward_model(loaded: LoadedModel, groups: Sequence[Group]) -> dict[str, Answer]:
    """Return the answers to groups of scores, on every process; called by all of them together."""
    dp_rank, dp_size = collectives.get_data_rank()
    lengths = [len(group[0].read) for group in groups]
    rows: list[list[Group]] = [[groups[i] for i in row] for row in group_into_rows(lengths)]
    rows += [[]] * (-len(rows) % dp_size)  # processes that share experts must run forward equally often
    # Where the scores of each row begin in `found`, which all processes fill together.
    starts = [0, *accumulate(sum(map(len, row)) for row in rows)]
    found = torch.zeros(sum(map(len, groups)), 2, dtype=torch.float64)
    # a pipeline works on several rows at a time, which then are of one length
    pipeline = loaded.config.parallel.pp
    at_a_time = 1 if pipeline == 1 else 2 * pipeline
    own = range(dp_rank, len(rows), dp_size)
    for begin in range(0, len(own), at_a_time):
        numbers = own[begin:begin + at_a_time]
        longest = max(sum(len(g[0].read) for g in rows[i]) for i in numbers)
        batches = [_ItemRow(rows[i], longest) for i in numbers]
        for i, values in zip(numbers, loaded.policy.map(batches, _row_values), strict=False):
            found[starts[i]:starts[i] + len(values)] = values
    total = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(found))
    return _answers(groups, total)


@torch.no_grad()
def of_hf_model(model: Any, groups: Sequence[Group]) -> dict[str, Answer]:
    """Return the answers of transformers' model to groups of scores."""
    # Four bytes a logit, in float32.
    limit_tokens = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)
    parts = []
    for lines in _lines(groups, limit_tokens):
        # padded at the end, which no token before can see
        ids = torch.zeros(len(lines), max(len(g[0].read) for g in lines), dtype=torch.int64)
        for line, group in enumerate(lines):
            ids[line, :len(group[0].read)] = torch.tensor(group[0].read)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for line, group in enumerate(lines):
            end = len(group[0].read)
            for score in group:
                asked = logits[line, end - len(score.continuation):end].float()
                labels = torch.tensor(score.continuation, device=asked.device)
                logprobs = asked.log_softmax(-1).gather(1, labels[:, None])
                parts.append([float(logprobs.sum()), float((asked.argmax(-1) == labels).all())])
    return _answers(groups, torch.tensor(parts, dtype=torch.float64).reshape(-1, 2))


class _ItemRow:
    """A row of documents with what is asked at their ends."""

    def __init__(self, groups: Sequence[Group], min_tokens: int) -> None:
        batch = DocumentBatch([group[0].read for group in groups] or [[0]], get_local_device(), min_tokens)
        self.inputs: ModelInputs = batch.inputs
        self.groups = groups
        self.ends: list[int] = (batch.ends + 1).tolist()


def _row_values(hidden: list[torch.Tensor], head: Head, row: _ItemRow) -> torch.Tensor:
    """Return [scores of the row, 2]: the sum of log-probabilities, and whether each token is the best one."""
    count = sum(map(len, row.groups))
    values = torch.zeros(count, 2, dtype=torch.float64)
    if not count:
        return values
    ends = row.ends[:len(row.groups)]
    places = torch.cat([torch.arange(end - max(len(s.continuation) for s in group), end)
                        for group, end in zip(row.groups, ends, strict=True)])
    states = prepare_head_input(hidden[0], head.config)
    best = torch.zeros(len(row.inputs.tokens), dtype=torch.int64)
    # Once for all variants: the most probable token does not depend on what is judged.
    best[places] = head.top_tokens(context.gather_positions(states, places)).cpu()
    number = [0, *accumulate(map(len, row.groups))]
    # documents that are judged twice and more, such as choices of one token, take the head as often
    # The first score of every document, then the second one of those that have two, and so on.
    for variant in range(max(map(len, row.groups))):
        labels = torch.zeros_like(best)
        wanted = torch.zeros(len(best), dtype=torch.bool)
        judged = [(i, end - len(group[variant].continuation), end) for i, (group, end)
                  in enumerate(zip(row.groups, ends, strict=True)) if variant < len(group)]
        for i, first, end in judged:
            labels[first:end] = torch.tensor(row.groups[i][variant].continuation)
            wanted[first:end] = True
        logprobs = head.logprobs(hidden[0], labels.to(states.device), wanted=wanted).double().cpu()
        for i, first, end in judged:
            values[number[i] + variant] = torch.tensor(
                [float(logprobs[first:end].sum()), float((best[first:end] == labels[first:end]).all())],
                dtype=torch.float64)
    return values


def _lines(groups: Sequence[Group], limit_tokens: int) -> list[Sequence[Group]]:
    found: list[Sequence[Group]] = []
    begin = 0
    for end in range(1, len(groups) + 1):
        longest = max(len(g[0].read) for g in groups[begin:end + 1])
        # what counts is the padded size together with the next group
        if end == len(groups) or longest * (end + 1 - begin) > limit_tokens:
            found.append(groups[begin:end])
            begin = end
    return found


def _answers(groups: Sequence[Group], values: torch.Tensor) -> dict[str, Answer]:
    scores = [score for group in groups for score in group]
    return {score.key: {"logprob": logprob, "greedy": greedy == 1}
            for score, (logprob, greedy) in zip(scores, values.tolist(), strict=True)}
