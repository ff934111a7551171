"""Requests answered by a model in this process, or on processes that are started for it, chunk by chunk.

Chunks follow from the requests alone, so that an evaluation that goes on behind a kill asks the engine for
the same batches.  Each chunk's answers are on disk before the next one is asked for.

Several evaluations of one model with one cache share its requests: each begins at another place and goes once
around.  A chunk is held while it is asked, so that nobody else asks it; where a process ends, so does its
hold. At the end every one of them has all answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.artifacts import atomic_write, disk_errors, holds
from megatron_sov.errors import UserError
from megatron_sov.eval.filling import ROW_TOKENS
from megatron_sov.eval.lm.answers import Answers
from megatron_sov.eval.lm.requests import Answer, Request, Score, Write, readings
from megatron_sov.generate.engine import MEGATRON, VLLM, Engine, run_engine
from megatron_sov.generate.request import LENGTH, STOP, Batching, Bounds, Generated, Sampling, Stop
from megatron_sov.generate.target import Target
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.train.stopping import StopFlag

CHUNK_ROWS, CHUNK_BATCHES = 4, 4
"""Rows of tokens that are read for likelihoods, and batches of sequences, that a chunk has at most for each
process with data of its own."""
ASK, WAIT, STOPPED, DONE = "ask", "wait", "stopped", "done"
WAIT_S = 1.0
Next = tuple[str, int, list[int]]
"""What to do next, number of the chunk, places in it of what has no answer."""


@dataclass(frozen=True)
class Running:
    """How a model is run."""

    target: Target
    """The model."""
    engine: str
    """One of `generate.engine.ENGINES`."""
    settings: tuple[str, ...]
    """`key=value` changes of layout and precision (megatron)."""
    nproc: int | None
    """Local processes (megatron)."""
    batching: Batching
    """What bounds memory."""
    end_ids: tuple[int, ...]
    """Tokens that end a continuation."""
    special_ids: dict[str, int]
    """Special tokens by their text: as a stop string such a token would never show in the text."""
    decode: Callable[[list[int]], str]
    """From token ids to text, without special tokens."""


class Model(Protocol):
    """What answers; where it runs on several processes, called by all of them together."""

    num_shares: int
    """Processes with sequences of their own."""

    def score(self, groups: Sequence[Sequence[Score]]) -> dict[str, Answer]:
        """Return the answers to scores."""
        ...

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Stop,
              streams: Sequence[int], should_stop: Callable[[], bool]) -> Generated:
        """Return continuations; where `should_stop` says so those that are not whole may be cut off."""
        ...


class OnMegatron:
    """A model on Megatron-Core."""

    def __init__(self, loaded: Any, batching: Batching) -> None:
        from megatron_sov.generate.generator import MegatronEngine
        from megatron_sov.mcore.parallel import collectives

        self._loaded, self._engine = loaded, MegatronEngine(loaded.policy, batching)
        self.num_shares = collectives.data_place()[1]

    def score(self, groups: Sequence[Sequence[Score]]) -> dict[str, Answer]:
        from megatron_sov.eval.lm.likelihoods import of_forward_model

        return of_forward_model(self._loaded, groups)

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Stop,
              streams: Sequence[int], should_stop: Callable[[], bool]) -> Generated:
        bounds = Bounds([sampling.max_new_tokens] * len(prompts), should_stop)
        return self._engine.generate(prompts, sampling, stop=stop, streams=streams, bounds=bounds)


class OnEngine:
    """transformers' model, or vLLM, which tells no likelihoods."""

    num_shares = 1

    def __init__(self, engine: Engine, model: Any) -> None:
        self._engine, self._model = engine, model

    def score(self, groups: Sequence[Sequence[Score]]) -> dict[str, Answer]:
        from megatron_sov.eval.lm.likelihoods import of_hf_model

        return of_hf_model(self._model, groups)

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Stop,
              streams: Sequence[int], should_stop: Callable[[], bool]) -> Generated:
        return self._engine.generate(prompts, sampling, stop=stop, streams=streams)


def answer_locally(running: Running, asked: Path, flag: StopFlag) -> bool:
    """Have a model answer what `write_asked` has written; returns whether it was asked to stop early.

    Every process of a torchrun or Slurm job calls it; only the first one reads and writes.
    """
    if running.engine == MEGATRON:
        from megatron_sov.generate.load import run_forward_model
        from megatron_sov.mcore.parallel.object_collectives import broadcast_object

        def on_ranks(loaded: Any) -> bool:
            requests, answers = _read_asked(asked) if loaded.world.is_main else ([], None)
            return _answer(OnMegatron(loaded, running.batching), running, broadcast_object(requests), answers,
                           flag)

        return bool(run_forward_model(running.target, list(running.settings), running.nproc, on_ranks))
    requests, answers = _read_asked(asked)
    if running.engine == VLLM:
        if any(isinstance(request, Score) for request in requests):
            raise UserError("--engine vllm: tells no likelihoods, which these tasks compare; leave it out")
        longest = max(len(r.prompt) + r.max_tokens for r in requests if isinstance(r, Write))
        return bool(run_engine(VLLM, running.target, lambda engine: _answer(
            OnEngine(engine, None), running, requests, answers, flag), longest=longest,
            batching=running.batching))
    from megatron_sov.generate.hf import HfEngine, load_hf

    model = load_hf(running.target.path)
    return _answer(OnEngine(HfEngine(model, running.batching), model), running, requests, answers, flag)


def write_asked(asked: Path, requests: Sequence[Request], answers: Answers) -> None:
    """Write down what is asked and where its answers are kept, for the process that asks the model."""
    rows = [{"kind": type(request).__name__, **asdict(request)} for request in requests]
    atomic_write(asked, json.dumps({"answers": str(answers.folder), "requests": rows}))


def _read_asked(asked: Path) -> tuple[list[Request], Answers]:
    raw = json.loads(asked.read_bytes())
    return [_request(row) for row in raw["requests"]], Answers(Path(raw["answers"]))


def _request(row: dict[str, Any]) -> Request:
    kind = row.pop("kind")
    tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in row.items()}
    return Score(**tuples) if kind == Score.__name__ else Write(**tuples)


def _answer(model: Model, running: Running, requests: Sequence[Request], answers: Answers | None,
            flag: StopFlag) -> bool:
    """Answer requests that are not answered yet, on all processes; the one with `answers` keeps them.

    Returns:
        Whether it was asked to stop before all were answered.
    """
    from megatron_sov.mcore.parallel.world import on_first

    chunks = list(chunks_of(requests, model.num_shares, running.batching))
    desk = None if answers is None else Desk(chunks, answers, flag)
    begin_s, num_read = time.monotonic(), 0
    with (contextlib.closing(desk) if desk is not None else contextlib.nullcontext(),
          work_bar("ask", len(requests), "request", desk is not None) as bar):
        while True:
            action, number, places = on_first(desk.next if desk is not None else _nothing)
            if action in (DONE, STOPPED):
                break
            if action == WAIT:
                continue
            asked = [chunks[number][i] for i in places]
            found = _chunk_answers(model, running, asked, flag)
            num_read += sum(map(num_tokens, asked))
            if desk is not None:
                desk.answered(number, found)
            bar.update(len(found))
    if desk is not None:
        print(f"asked {desk.num_answered:,} requests with {num_read:,} tokens in "
              f"{time.monotonic() - begin_s:.1f} s", file=sys.stderr)
    return bool(action == STOPPED)


def _nothing() -> Next:
    """Stand for the first process's desk where there is none: its answer counts."""
    return DONE, 0, []


def num_tokens(request: Request) -> int:
    """Return the tokens that a model is given with a request."""
    return len(request.read) + 1 if isinstance(request, Score) else len(request.prompt)


def chunks_of(requests: Sequence[Request], num_shares: int, batching: Batching) -> Iterator[list[Request]]:
    """Yield requests that are answered before anything is written down: likelihoods from the longest, then
    continuations that an engine can be asked for together."""
    limit, size = CHUNK_ROWS * ROW_TOKENS * num_shares, CHUNK_BATCHES * batching.batch_size * num_shares
    tokens = count = 0
    chunk: list[Request] = []
    for group in readings([r for r in requests if isinstance(r, Score)]):
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


def _chunk_answers(model: Model, running: Running, chunk: Sequence[Request],
                   flag: StopFlag) -> dict[str, Answer]:
    scores = [r for r in chunk if isinstance(r, Score)]
    if scores:
        return model.score(readings(scores))
    writes = [r for r in chunk if isinstance(r, Write)]
    first = writes[0]
    special = [running.special_ids[text] for text in first.until if text in running.special_ids]
    stop = Stop((*running.end_ids, *special),
                tuple(text for text in first.until if text not in running.special_ids), running.decode)
    sampling = Sampling(first.max_tokens, first.temperature, first.top_k, first.top_p, first.seed)
    prompts = [[int(token) for token in write.prompt] for write in writes]
    found = model.write(prompts, sampling, stop, [w.stream for w in writes], lambda: flag.reason is not None)
    answers: dict[str, Answer] = {}
    for write, tokens, reason in zip(writes, found.continuations, found.finish_reasons, strict=True):
        # others were cut off by a wish to stop
        if reason == STOP or len(tokens) >= write.max_tokens or flag.reason is None:
            answers[write.key] = {"text": stop.cut_text(running.decode(tokens)),
                                  "finish_reason": STOP if reason == STOP else LENGTH}
    return answers


class Desk:
    """Deals out chunks to this process.

    Args:
        chunks: all of them.
        answers: what is there already, and where more is kept.
        flag: says whether to stop.
    """

    def __init__(self, chunks: Sequence[Sequence[Request]], answers: Answers, flag: StopFlag) -> None:
        self._chunks, self._answers, self._flag = chunks, answers, flag
        index, count = _place_in_array()
        begin = index * len(chunks) // count
        self._left = [*range(begin, len(chunks)), *range(begin)]
        self._held = -1
        self.num_answered = 0
        """Requests that this process has answered."""

    def next(self) -> Next:
        if self._flag.reason is not None:
            return STOPPED, 0, []
        self._answers.reread()
        postponed: list[int] = []
        while self._left:
            number = self._left.pop(0)
            if not self._open(number):
                continue
            if self._hold(number):
                self._answers.reread()  # whoever held it before may have answered
                if open_ := self._open(number):
                    self._left = [*postponed, *self._left]
                    return ASK, number, open_
                self._release(number)
                continue
            postponed.append(number)
        self._left = postponed
        if not postponed:
            return DONE, 0, []
        time.sleep(WAIT_S)
        return WAIT, 0, []

    def answered(self, number: int, found: dict[str, Answer]) -> None:
        """Keep the answers of the chunk that is held, and let it go."""
        self._answers.add(found)
        self.num_answered += len(found)
        if len(found) < len(self._open(number)):
            self._left.append(number)  # cut off by a wish to stop
        self._release(number)

    def close(self) -> None:
        """Let go of the chunk that is held, if any."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _open(self, number: int) -> list[int]:
        return [i for i, request in enumerate(self._chunks[number]) if request.key not in self._answers]

    def _hold(self, number: int) -> bool:
        """Return whether the chunk is this process's now; where the disk knows no locks, all are."""
        with disk_errors(self._answers.folder):
            self._answers.folder.mkdir(parents=True, exist_ok=True)
            self._held = os.open(self._file(number), os.O_RDWR | os.O_CREAT, 0o666)
        if holds(self._held) is not False:
            return True
        self.close()
        return False

    def _release(self, number: int) -> None:
        self._file(number).unlink(missing_ok=True)
        self.close()

    def _file(self, number: int) -> Path:
        return self._answers.folder / f"{_name(self._chunks[number])}.held"


def _name(chunk: Sequence[Request]) -> str:
    return hashlib.sha256("".join(request.key for request in chunk).encode()).hexdigest()[:24]


def _place_in_array() -> tuple[int, int]:
    """Return which job of a Slurm array this is, and of how many."""
    try:
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    except ValueError:
        return 0, 1
    return (index, count) if 0 <= index < count else (0, 1)
