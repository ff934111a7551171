"""Resolve the target of `eval lm`, and answer requests with its engine: ours at any layout, transformers, or
vLLM.

Chunks depend only on the requests, so that a restarted evaluation sends the same batches. Each chunk's
answers are on disk before the next chunk starts. The jobs of a Slurm array share chunks through
`AnswerCache.iter_open_chunks`, and each of them ends with every answer. """

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.answers import (
    Answer, AnswerCache, GenerationRequest, LikelihoodRequest, Request, group_by_input)
from megatron_sov.bench.lm.results import EvaluatedModel
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.chat.folder import TOKENIZER_JSON, read_chat_encoder
from megatron_sov.chat.marks import build_text_decoder
from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.language_model import prepare_head_input
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import choose_inference_precision, get_local_device
from megatron_sov.engine.parallel.values import broadcast_object
from megatron_sov.engine.parallel.world import run_on_first
from megatron_sov.eval.heldout_loss import ROW_TOKENS, group_into_rows
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import check_engine, run_with_engine
from megatron_sov.infer.engines.load import LoadedModel, load_tokenizer, run_forward_model
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.engines.transformers_engine import HfEngine, load_configured_hf
from megatron_sov.infer.prompts import read_stop_ids
from megatron_sov.infer.request import (
    LENGTH, MEGATRON, STOP, TRANSFORMERS, VLLM, Batching, GenerationBounds, GenerationResult, Sampling,
    StopRule, Tokens)
from megatron_sov.model.pretrained import hash_model_folder
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.work.processes.stop_signals import StopFlag
from megatron_sov.work.progress.progress_bar import create_bar

CHUNK_ROWS, CHUNK_BATCHES = 4, 4
"""Largest chunk per data-parallel rank: `ROW_TOKENS` rows for likelihoods, batches for generation."""
LOGITS_BYTES = 1 << 29
"""Logits per transformers batch, unless a single document has more."""
UNKNOWN_LENGTH = 2048
"""Context length in tokens for a folder without one, as in lm-eval."""
Group = Sequence[LikelihoodRequest]
"""Requests with equal `input_tokens`."""


@dataclass(frozen=True)
class AnswerEngine:
    target: Target
    engine: str
    """From `infer.request.ENGINES`."""
    settings: tuple[str, ...]
    """`key=value` for layout and precision (megatron)."""
    nproc: int | None
    """Local processes (megatron)."""
    batching: Batching
    end_ids: tuple[int, ...]
    """Token ids that end a continuation."""
    special_ids: dict[str, int]
    """Text -> id of special tokens, which `decode` drops."""
    decode: Callable[[list[int]], str]
    """Token ids -> text without special tokens."""


@dataclass(frozen=True)
class Subject:
    model: EvaluatedModel
    identity: dict[str, Any]
    """Values that determine answers in addition to the request; see `get_answer_folder`."""
    tokenizer: Any
    """Tokenizer from transformers."""
    max_length: int
    """Context length in tokens."""
    engine: AnswerEngine


def resolve_subject(path: str, settings: LmEvalSettings, with_hash: bool = True) -> Subject:
    """Resolve a target as typed; `with_hash` computes the content hash, which reads from every file. Raises
    `UserError`: no model at `path`, or settings that the model does not support."""
    check_model_path(Path(path))
    target = find_target(Path(path))
    has_layout = bool(settings.settings) or settings.nproc is not None
    engine = settings.engine or (TRANSFORMERS if target.is_hf and not has_layout else MEGATRON)
    check_engine(engine, target, settings.settings, settings.nproc)
    folder = target.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    encoder = read_chat_encoder(folder) if settings.chat_template else None
    if settings.chat_template and (encoder is None or not tokenizer.chat_template):
        raise UserError(f"--apply-chat-template: {folder} has no chat template; leave the option out, or add "
                        "the chat template from training")
    max_length = settings.max_length_tokens or target.max_tokens
    max_length = UNKNOWN_LENGTH if math.isinf(max_length) else int(max_length)
    if max_length > target.max_tokens:
        raise UserError(f"--max-length {max_length}: the model ends at {target.max_tokens}; choose less")
    digest = hash_model_folder(target.path) if with_hash else ""
    model = EvaluatedModel(str(target.path), digest, "huggingface" if target.is_hf else "checkpoint",
                           target.step, str(settings.run) if settings.run else None)
    end_ids = read_stop_ids(target, tokenizer.eos_token_id, encoder)
    special_ids = {str(token.content): int(number) for number, token in tokenizer.added_tokens_decoder.items()
                   if token.special}
    decode = build_text_decoder(folder / TOKENIZER_JSON, end_ids,
                                lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    # layouts agree up to rounding and share answers
    numeric_settings = sorted(setting for setting in settings.settings if not setting.startswith("parallel."))
    identity = {"model": digest, "engine": engine, "settings": numeric_settings, "ends": list(end_ids),
                "precision": choose_inference_precision()}
    answer_engine = AnswerEngine(target, engine, tuple(settings.settings), settings.nproc,
                                 Batching(settings.batch_size), end_ids, special_ids, decode)
    return Subject(model, identity, tokenizer, max_length, answer_engine)


@dataclass(frozen=True)
class _Model:
    """A loaded model; on several ranks the calls are collective."""

    generate: Callable[..., GenerationResult]
    score: Callable[[Sequence[Group]], dict[str, Answer]]
    dp_size: int = 1
    """Number of ranks with sequences of their own."""


def answer_requests(engine: AnswerEngine, requests: Sequence[Request], cache: Path | None,
                    flag: StopFlag) -> bool:
    """Answer requests without an answer in the cache; return whether a signal interrupted the work.

    Collective in a torchrun or Slurm job: only the first rank has requests and `cache`, the folder from
    `get_answer_folder`.
    """
    if engine.engine == MEGATRON:
        def run_ranks(loaded: LoadedModel) -> bool:
            generator = MegatronEngine(loaded.policy, engine.batching)

            def generate(prompts: Sequence[Tokens], sampling: Sampling, **arguments: Any) -> GenerationResult:
                # a signal ends generation early, with incomplete answers
                bounds = GenerationBounds([sampling.max_new_tokens] * len(prompts),
                                          lambda: flag.reason is not None)
                return generator.generate(prompts, sampling, bounds=bounds, **arguments)

            model = _Model(generate, partial(score_with_megatron, loaded), collectives.get_data_rank()[1])
            return _answer_chunks(model, engine, broadcast_object(requests),
                                  cache if loaded.world.is_main else None, flag)

        return bool(run_forward_model(engine.target, list(engine.settings), engine.nproc, run_ranks))
    if engine.engine == VLLM:
        if any(isinstance(request, LikelihoodRequest) for request in requests):
            raise UserError(f"--engine {engine.engine}: computes no likelihoods, which these tasks compare; "
                            "leave it out")
        longest = max(len(request.prompt) + request.max_tokens for request in requests
                      if isinstance(request, GenerationRequest))

        return bool(run_with_engine(engine.engine, engine.target, lambda server: _answer_chunks(
            _Model(server.generate, lambda groups: {}), engine, requests, cache, flag), longest=longest,
            batching=engine.batching))
    hf_model = load_configured_hf(engine.target.path, engine.settings)
    model = _Model(HfEngine(hf_model, engine.batching).generate, partial(score_with_transformers, hf_model))
    return _answer_chunks(model, engine, requests, cache, flag)


def _answer_chunks(model: _Model, engine: AnswerEngine, requests: Sequence[Request], cache: Path | None,
                   flag: StopFlag) -> bool:
    # every rank builds the same chunks; the first rank announces the next chunk
    chunks = list(iter_chunks(requests, model.dp_size, engine.batching))
    begin_s, num_tokens, num_answered = time.monotonic(), 0, 0
    open_chunks: Iterator[tuple[int, list[int]]] = iter(())
    with contextlib.ExitStack() as stack:
        if cache is not None:
            answers = stack.enter_context(contextlib.closing(AnswerCache(cache)))
            open_chunks = takewhile(lambda _: flag.reason is None, answers.iter_open_chunks(chunks))
        bar = stack.enter_context(create_bar("ask", len(requests), "request", cache is not None))
        while (step := run_on_first(lambda: next(open_chunks, None))) is not None:
            number, indices = step
            unanswered = [chunks[number][i] for i in indices]
            chunk_answers = _answer_chunk(model, engine, unanswered, flag)
            num_tokens += sum(map(count_tokens, unanswered))
            num_answered += len(chunk_answers)
            if cache is not None:
                answers.save_answers(chunk_answers)
            bar.update(len(chunk_answers))
    if cache is not None:
        print(f"asked {num_answered:,} requests with {num_tokens:,} tokens in "
              f"{time.monotonic() - begin_s:.1f} s", file=sys.stderr)
    return bool(run_on_first(lambda: flag.reason is not None))


def count_tokens(request: Request) -> int:
    if isinstance(request, LikelihoodRequest):
        return len(request.input_tokens) + 1
    return len(request.prompt)


def iter_chunks(requests: Sequence[Request], dp_size: int, batching: Batching) -> Iterator[list[Request]]:
    """Yield likelihood requests from the longest, then generations with equal `sampling`."""
    max_tokens, max_size = CHUNK_ROWS * ROW_TOKENS * dp_size, CHUNK_BATCHES * batching.batch_size * dp_size
    tokens = count = 0
    chunk: list[Request] = []
    for group in group_by_input([r for r in requests if isinstance(r, LikelihoodRequest)]):
        # a group stays whole: its answers come from one forward pass
        if chunk and (tokens + len(group[0].input_tokens) > max_tokens or count == max_size):
            yield chunk
            tokens, count, chunk = 0, 0, []
        tokens, count = tokens + len(group[0].input_tokens), count + 1
        chunk.extend(group)
    if chunk:
        yield chunk
    by_sampling: dict[Any, list[Request]] = {}
    for request in requests:
        if isinstance(request, GenerationRequest):
            by_sampling.setdefault(request.sampling, []).append(request)
    for generations in by_sampling.values():
        for begin in range(0, len(generations), max_size):
            yield generations[begin:begin + max_size]


def _answer_chunk(model: _Model, engine: AnswerEngine, chunk: Sequence[Request],
                  flag: StopFlag) -> dict[str, Answer]:
    likelihoods = [request for request in chunk if isinstance(request, LikelihoodRequest)]
    if likelihoods:
        return model.score(group_by_input(likelihoods))
    requests = [request for request in chunk if isinstance(request, GenerationRequest)]
    first = requests[0]
    # special tokens never show in decoded text: stop by id
    special_ids = [engine.special_ids[text] for text in first.until if text in engine.special_ids]
    stop_texts = tuple(text for text in first.until if text not in engine.special_ids)
    stop = StopRule((*engine.end_ids, *special_ids), stop_texts, engine.decode)
    sampling = Sampling(first.max_tokens, first.temperature, first.top_k, first.top_p, first.seed)
    prompts = [[int(token) for token in request.prompt] for request in requests]
    result = model.generate(prompts, sampling, stop=stop, streams=[request.stream for request in requests])
    answers: dict[str, Answer] = {}
    for request, tokens, reason in zip(requests, result.continuations, result.finish_reasons, strict=True):
        # a signal leaves the remaining answers incomplete
        if reason == STOP or len(tokens) >= request.max_tokens or flag.reason is None:
            answers[request.key] = {"text": stop.truncate_text(engine.decode(tokens)),
                                    "finish_reason": STOP if reason == STOP else LENGTH}
    return answers


def score_with_megatron(loaded: LoadedModel, groups: Sequence[Group]) -> dict[str, Answer]:
    """Answer groups with our engine; collective, with equal results on every rank."""
    dp_rank, dp_size = collectives.get_data_rank()
    lengths = [len(group[0].input_tokens) for group in groups]
    rows: list[list[Group]] = [[groups[i] for i in row] for row in group_into_rows(lengths)]
    rows += [[]] * (-len(rows) % dp_size)  # expert-parallel ranks must run equally many forward passes
    starts = [0, *accumulate(sum(map(len, row)) for row in rows)]
    values = torch.zeros(sum(map(len, groups)), 2, dtype=torch.float64)
    # a pipeline processes several rows at once, which need equal lengths
    pipeline = loaded.config.parallel.pp
    batch_size = 1 if pipeline == 1 else 2 * pipeline
    own_rows = range(dp_rank, len(rows), dp_size)
    for begin in range(0, len(own_rows), batch_size):
        numbers = own_rows[begin:begin + batch_size]
        longest = max(sum(len(group[0].input_tokens) for group in rows[i]) for i in numbers)
        batches = [_LikelihoodRow(rows[i], longest) for i in numbers]
        for i, row_values in zip(numbers, loaded.policy.map(batches, _score_row), strict=False):
            values[starts[i]:starts[i] + len(row_values)] = row_values
    return _build_answers(groups, collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values)))


class _LikelihoodRow:
    """A row that packs the groups' inputs."""

    def __init__(self, groups: Sequence[Group], min_tokens: int) -> None:
        documents = [group[0].input_tokens for group in groups]
        batch = DocumentBatch(documents or [[0]], get_local_device(), min_tokens)
        self.inputs: ModelInputs = batch.inputs
        self.groups = groups
        self.ends: list[int] = (batch.ends + 1).tolist()


def _score_row(hidden: list[torch.Tensor], head: Head, row: _LikelihoodRow) -> torch.Tensor:
    """Return [requests, 2] float64: sum of log-probabilities, and 1 if every token is the most probable."""
    values = torch.zeros(sum(map(len, row.groups)), 2, dtype=torch.float64)
    if not len(values):
        return values
    ends = row.ends[:len(row.groups)]
    group_positions = []
    for group, end in zip(row.groups, ends, strict=True):
        longest = max(len(request.continuation) for request in group)
        group_positions.append(torch.arange(end - longest, end))
    positions = torch.cat(group_positions)
    states = prepare_head_input(hidden[0], head.config)
    best = torch.zeros(len(row.inputs.tokens), dtype=torch.int64)
    best[positions] = head.top_tokens(context.gather_positions(states, positions)).cpu()
    first_values = [0, *accumulate(map(len, row.groups))]
    # a pass through the head per variant: the first request in every group, then the second, ...
    for variant in range(max(map(len, row.groups))):
        labels = torch.zeros_like(best)
        wanted = torch.zeros(len(best), dtype=torch.bool)
        spans = [(i, end - len(group[variant].continuation), end) for i, (group, end)
                 in enumerate(zip(row.groups, ends, strict=True)) if variant < len(group)]
        for i, begin, end in spans:
            labels[begin:end] = torch.tensor(row.groups[i][variant].continuation)
            wanted[begin:end] = True
        logprobs = head.logprobs(hidden[0], labels.to(states.device), wanted=wanted).double().cpu()
        for i, begin, end in spans:
            is_greedy = bool((best[begin:end] == labels[begin:end]).all())
            scores = [float(logprobs[begin:end].sum()), float(is_greedy)]
            values[first_values[i] + variant] = torch.tensor(scores, dtype=torch.float64)
    return values


@torch.no_grad()
def score_with_transformers(model: Any, groups: Sequence[Group]) -> dict[str, Answer]:
    # four bytes per logit in float32
    max_tokens = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)
    values = []
    for batch in _iter_padded_batches(groups, max_tokens):
        # padding at the end is invisible to earlier tokens
        ids = torch.zeros(len(batch), max(len(group[0].input_tokens) for group in batch), dtype=torch.int64)
        for line, group in enumerate(batch):
            ids[line, :len(group[0].input_tokens)] = torch.tensor(group[0].input_tokens)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for line, group in enumerate(batch):
            end = len(group[0].input_tokens)
            for request in group:
                scored = logits[line, end - len(request.continuation):end].float()
                labels = torch.tensor(request.continuation, device=scored.device)
                logprobs = scored.log_softmax(-1).gather(1, labels[:, None])
                values.append([float(logprobs.sum()), float((scored.argmax(-1) == labels).all())])
    return _build_answers(groups, torch.tensor(values, dtype=torch.float64).reshape(-1, 2))


def _iter_padded_batches(groups: Sequence[Group], max_tokens: int) -> Iterator[Sequence[Group]]:
    """Yield batches with at most `max_tokens` padded tokens, or a single group."""
    begin = 0
    for end in range(1, len(groups) + 1):
        longest = max(len(group[0].input_tokens) for group in groups[begin:end + 1])
        # padded size together with the next group
        if end == len(groups) or longest * (end + 1 - begin) > max_tokens:
            yield groups[begin:end]
            begin = end


def _build_answers(groups: Sequence[Group], values: torch.Tensor) -> dict[str, Answer]:
    requests = [request for group in groups for request in group]
    return {request.key: {"logprob": logprob, "greedy": greedy == 1}
            for request, (logprob, greedy) in zip(requests, values.tolist(), strict=True)}
