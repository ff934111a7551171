"""What a model is asked on the way to a score (the likelihood of some tokens, or a continuation), what it has
answered, and answers of an OpenAI-compatible endpoint.  No torch here.

Each request has a key, which is the same wherever the same is asked; answers are kept by it.

    CACHE/MODEL/records-*                 answers, in a journal of each asking process (`progress.journal`)
    CACHE/MODEL/asking/*                  chunks that are being asked for, held (`progress.locks`)

An endpoint, as vLLM, SGLang and others serve it, gives texts by `/completions`, with a chat template by
`/chat/completions`; likelihoods by `/completions` with `echo` and `logprobs`, which not every endpoint has.
Requests, retries and the key are those of `work.endpoints`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.errors import UserError, warn
from megatron_sov.bench.lm.settings import OTHER_MODEL, EndpointSettings
from megatron_sov.infer.request import LENGTH, STOP
from megatron_sov.train.stopping import StopFlag
from megatron_sov.work.endpoints.answers import CHAT_PROBES, TEXT_PROBES, BadAnswer, Recognition
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.progress.journal import Journal, later_records
from megatron_sov.work.progress.locks import taking
from megatron_sov.work.progress.progress_bar import work_bar

Answer = dict[str, float | bool | str | None]
"""What came back: of a `AnswerScore` `logprob` and `greedy`, of a `Write` `text` and `finish_reason`; of
either `failed`, where an endpoint gave none."""
WAIT_S = 1.0
"""Before chunks that others hold are looked at again."""


@dataclass(frozen=True)
class AnswerScore:
    """How likely some tokens are behind others."""

    context: tuple[int, ...]
    """What stands before, at least one token."""
    continuation: tuple[int, ...]
    """What is judged, at least one token."""

    @property
    def read(self) -> tuple[int, ...]:
        """Tokens that the model reads: all but the last one."""
        return (self.context + self.continuation)[:-1]

    @cached_property
    def key(self) -> str:
        return _digest(["score", self.context, self.continuation])


@dataclass(frozen=True)
class Write:
    prompt: tuple[int, ...] | str
    """Token ids; of an endpoint the text, or messages as JSON where `chat` says so."""
    until: tuple[str, ...]
    """Texts that end it and are no part of it."""
    max_tokens: int
    temperature: float = 0.0
    """0: the most probable tokens."""
    top_k: int = 0
    """0: from all tokens."""
    top_p: float = 1.0
    """Smallest set of tokens that holds this much probability."""
    seed: int = 0
    sample: int = 0
    """Which of several continuations of one prompt; 0 at temperature 0, where all are the same."""
    chat: bool = False

    @property
    def sampling(self) -> tuple[int, float, int, float, int, tuple[str, ...]]:
        """What an engine can be asked for together."""
        return (self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, self.until)

    @cached_property
    def key(self) -> str:
        return _digest(["write", self.prompt, *self.sampling, self.sample, self.chat])

    @property
    def stream(self) -> int:
        """Number of its stream of random numbers: the same wherever the same is asked."""
        # 48 bits fit every engine's seed, and do not depend on the order of requests.
        return int(self.key[:12], 16)


Request = AnswerScore | Write


def distinct(requests: Iterable[Request]) -> list[Request]:
    return list({request.key: request for request in requests}.values())


def readings(scores: Sequence[AnswerScore]) -> list[list[AnswerScore]]:
    """Return scores in groups for which the model reads the same tokens, the longest first: choices of one
    token behind one question are read once."""
    groups: dict[tuple[int, ...], list[AnswerScore]] = {}
    for score in scores:
        groups.setdefault(score.read, []).append(score)
    # The longest first: if memory is too small for them, that shows at once.
    return sorted(groups.values(), key=lambda group: -len(group[0].read))


def _digest(value: list[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def folder_of(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Return where a model's answers lie.

    Args:
        cache: folder of all models' answers.
        identity: JSON values on which answers depend beside the request: the model, and how it is run.
    """
    return cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class Answers(dict[str, Answer]):
    """What a model has answered, by the keys of requests, in this and other evaluations.

    Args:
        folder: this model's, see `folder_of`.

    Raises:
        UserError: it has answers of an earlier version.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._journal: Journal | None = None
        self._ends: dict[Path, int] = {}
        if earlier := next(folder.glob("*.jsonl"), None):
            raise UserError(f"--cache: {earlier} holds answers of an earlier version, which this one does "
                            "not read; delete it, or name another --cache")
        self.reread()

    def keep(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; a kill behind this loses none of them.

        Raises:
            UserError: the disk is full, or nothing can be written there.
        """
        if self._journal is None:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # a file of its own for each process, so that none writes into another's lines
                self._journal = Journal(self.folder, uuid.uuid4().hex)
        # on the disk first: what only memory has would be asked and paid for again after a kill
        self._journal.add((key, json.dumps(answer).encode()) for key, answer in answers.items())
        self.update(answers)

    def reread(self) -> None:
        """Take in what has been written since, by this process or others."""
        self.update((str(key), json.loads(answer)) for key, answer in later_records(self.folder, self._ends))

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def deal(self, chunks: Sequence[Sequence[Request]], should_stop: Callable[[], bool]
             ) -> Generator[tuple[int, list[int]], None, None]:
        """Yield what this process is to ask for: the number of a chunk, and the places in it that have no
        answer.  Nobody else asks for the chunk until the next one is wanted; where a process ends, so does
        its hold.  While others hold all that is left, the places are none.

        Each job of a Slurm array begins at another chunk and goes once around.
        """
        index, count = _place_in_array()
        # Jobs begin apart, so that they seldom meet at one chunk.
        begin = index * len(chunks) // count
        left = deque([*range(begin, len(chunks)), *range(begin)])
        num_busy = 0
        while left and not should_stop():
            chunk = chunks[number := left.popleft()]
            if not self._places(chunk):
                continue
            name = hashlib.sha256("".join(request.key for request in chunk).encode()).hexdigest()[:24]
            # Named by the requests: other evaluations that ask for the same chunk take turns.
            with taking(self.folder / "asking" / name) as is_ours:
                self.reread()  # whoever held it before may have answered
                if is_ours and (places := self._places(chunk)):
                    yield number, places
            if self._places(chunk):  # cut off by a wish to stop, or held by another
                left.append(number)
            # A whole round without a free chunk: wait before the next one.
            num_busy = 0 if is_ours else num_busy + 1
            if left and num_busy >= len(left):
                time.sleep(WAIT_S)
                num_busy = 0
                yield number, []  # processes of the same model must not wait for minutes

    def _places(self, chunk: Sequence[Request]) -> list[int]:
        return [i for i, request in enumerate(chunk) if request.key not in self]


def _place_in_array() -> tuple[int, int]:
    """Return which job of a Slurm array this is, and of how many."""
    try:
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    except ValueError:
        return 0, 1
    return (index, count) if 0 <= index < count else (0, 1)


LIMITS = EndpointLimits(timeout_s=600.0, max_attempts=5, backoff_s=1.0, requests_per_minute=0.0, max_cost=0.0,
                        input_price=0.0, output_price=0.0)
"""Ten minutes are enough for an answer of a reasoning model; an item whose request has failed five times has
failed, and the same command asks it again."""
CACHE = "endpoint.sqlite"
MAX_STOPS = 4
"""Stop strings that endpoints take; what comes behind others is cut here."""
NO_ECHO = ("tells no likelihoods of what it is given (echo with logprobs), as many do not; evaluate a "
           "checkpoint or folder, or leave tasks out that compare likelihoods")


class AsksEndpoint:
    """Asks one endpoint."""

    def __init__(self, url: str, settings: EndpointSettings, folder: Path, answers: dict[str, Answer]
                 ) -> None:
        self._cache = EndpointCache(folder / CACHE)
        base = url.rstrip("/")
        self._settings, self._answers = settings, answers
        self._texts, self._chats = (
            Endpoint(f"{base}/{path}", settings.key_env, LIMITS, self._cache, told=warn,
                     recognition=Recognition(settings.model, probes, OTHER_MODEL, settings.same_model))
            for path, probes in (("completions", TEXT_PROBES), ("chat/completions", CHAT_PROBES)))

    def recall(self, requests: Sequence[Request]) -> None:
        """Take in what was answered before.

        Raises:
            UserError: the model is not the one whose answers are kept, under the same address and name.
        """
        for request in requests:
            endpoint, payload, read = self._asking(request)
            if (kept := self._cache.get(endpoint.key(payload))) is not None:
                with contextlib.suppress(BadAnswer):  # kept by other code
                    self._answers[request.key] = read(kept)

    def answer(self, requests: Sequence[Request], flag: StopFlag) -> bool:
        """Answer requests; returns whether it was asked to stop before the end.

        What is not answered after all attempts is noted as failed, for this time alone.

        Raises:
            UserError: no request can succeed: the key, the address, or no likelihoods.
        """
        left = [request for request in requests if request.key not in self._answers]
        with (work_bar("ask", len(requests), "request") as bar,
              ThreadPoolExecutor(self._settings.concurrent) as pool):
            bar.update(len(requests) - len(left))
            under_way = {pool.submit(self._ask, request): request for request in left}
            try:
                for future in as_completed(under_way):
                    try:
                        found = future.result()
                    except (BadAnswer, TimeoutError) as e:
                        found = {"failed": str(e)}
                    self._answers[under_way[future].key] = found
                    bar.update(1)
                    if flag.reason is not None:
                        return True
            finally:
                # Those under way are waited for: their answers are paid for, and kept.
                pool.shutdown(wait=True, cancel_futures=True)
        return False

    def _ask(self, request: Request) -> Answer:
        endpoint, payload, read = self._asking(request)
        return endpoint.ask(payload, read)

    def _asking(self, request: Request) -> tuple[Endpoint, dict[str, Any], Callable[[Any], Answer]]:
        if isinstance(request, AnswerScore):
            tokens = [*request.context, *request.continuation]
            # endpoints must write one token at least; `_likelihood` reads only those that were given
            return (self._texts, {"model": self._settings.model, "prompt": tokens, "max_tokens": 1,
                                  "temperature": 0, "logprobs": 1, "echo": True},
                    lambda raw: _likelihood(raw, len(request.context), len(tokens)))
        payload: dict[str, Any] = {"model": self._settings.model, "max_tokens": request.max_tokens,
                                   "temperature": request.temperature}
        if request.until:
            # the rest are cut in `_text`: the answer is the same, only longer under way
            payload["stop"] = list(request.until[:MAX_STOPS])
        if request.temperature:
            payload |= {"top_p": request.top_p, "seed": (request.seed + request.stream) % 2**31}
            payload |= {"top_k": request.top_k} if request.top_k else {}
        if request.chat:
            payload |= json.loads(str(request.prompt))
        else:
            payload["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        return (self._chats if request.chat else self._texts, payload,
                lambda raw: _text(raw, request, request.chat))


def _choice(raw: Any) -> dict[str, Any]:
    try:
        choice = raw["choices"][0]
    except (TypeError, KeyError, IndexError):
        raise BadAnswer("the endpoint sent an answer without choices") from None
    if not isinstance(choice, dict):
        raise BadAnswer("the endpoint sent a choice that is no object")
    return choice


def _text(raw: Any, request: Write, chat: bool) -> Answer:
    choice = _choice(raw)
    message = choice.get("message") if chat else choice
    text = message.get("content" if chat else "text") if isinstance(message, dict) else None
    if chat and text is None and isinstance(message, dict):
        text = ""  # all of it was reasoning, which was cut at the limit
    if not isinstance(text, str):
        raise BadAnswer("the endpoint sent a choice without text")
    for stop in request.until:
        text = text.split(stop)[0]
    return {"text": text, "finish_reason": LENGTH if choice.get("finish_reason") == "length" else STOP}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _likelihood(raw: Any, start: int, end: int) -> Answer:
    """Return the likelihood of tokens `start` to `end` of what was echoed.

    Raises:
        UserError: nothing was echoed.
        BadAnswer: what was echoed has other tokens.
    """
    found = _choice(raw).get("logprobs")
    logprobs = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(logprobs, list) or len(logprobs) < end:
        raise UserError(f"the endpoint {NO_ECHO}")
    asked = logprobs[start:end]
    if not all(_is_number(value) for value in asked):
        raise BadAnswer("the endpoint told no likelihood of some tokens")
    best = found.get("top_logprobs")
    greedy = isinstance(best, list) and all(
        isinstance(top, dict) and bool(top) and all(map(_is_number, top.values()))
        and value >= max(top.values()) for value, top in zip(asked, best[start:end], strict=False))
    return {"logprob": float(sum(asked)), "greedy": greedy}
