"""Engines behind HTTP that take token ids and give token ids: what every one of them is asked, and says.

Text never comes between: what a trainer learns from are the very ids that were drawn, with the
log-probability of each and the version of the weights that drew it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered, reason_of
from megatron_sov.work.endpoints.transport import Transport

if TYPE_CHECKING:
    import numpy as np

STOP, LENGTH, ABORTED = "stop", "length", "abort"
"""Why an answer is no longer: a token ended it; it is as long as allowed; it was asked to end."""
LOADED = 0
"""Version of weights that an engine has from its own start, which it may name as it likes."""
CONTROL_S = 600.0
"""For what changes an engine; an answer has a limit of its own."""
LOOK_S = 10.0
"""For a sign of life."""
_INT32 = 1 << 31
"""Above what a row of rollouts can hold."""
NO_LOGPROB = -9999.0
"""What vLLM tells in the place of NaN and of -inf."""
MAX_ANSWER_BYTES = 1 << 30
"""Of an answer with routes: some hundred bytes for each token and layer."""


@dataclass(frozen=True)
class TokenRequest:
    """A prompt that is to be continued, or several of them."""

    name: str
    """By which it can be aborted, where it is of one prompt; no other request has it."""
    ids: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    """0: from all tokens."""
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, and are its last one."""
    with_routes: bool = False
    """Whether to tell which experts tokens visited."""
    count: int = 1
    """Answers to be drawn of each prompt; 1 where the temperature is 0."""
    others: tuple[Sequence[int], ...] = ()
    """Prompts beside the first one: weights must not change meanwhile, for such answers do not tell which
    ones wrote them."""

    @property
    def prompts(self) -> list[list[int]]:
        """Return all prompts, in order."""
        return [list(ids) for ids in (self.ids, *self.others)]

    @property
    def num_answers(self) -> int:
        """Return how many answers come, those of a prompt together."""
        return self.count * (1 + len(self.others))


@dataclass(frozen=True)
class VersionSpan:
    """Tokens of an answer that one version of the weights wrote."""

    version: int
    start: int
    end: int
    """One behind the last."""


@dataclass(frozen=True)
class TokenAnswer:
    """What was written behind a prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Of each under the distribution that it was drawn from."""
    reason: str
    """`STOP`, `LENGTH` or `ABORTED`."""
    versions: tuple[VersionSpan, ...] = ()
    """Of the tokens, in order; none: the engine does not tell them."""
    routes: np.ndarray | None = field(default=None, compare=False)
    """[tokens read, layers, experts of a token], as the engine tells them."""

    def version_of_each(self, count: int, otherwise: int) -> list[int]:
        """Return the version of each of the first tokens; `otherwise` where the engine does not tell it."""
        versions = [otherwise] * count
        for span in self.versions:
            versions[span.start:span.end] = [span.version] * (min(span.end, count) - span.start)
        return versions


class TokenServer(Protocol):
    """An engine at one address, asked from any thread.

    Each call raises `TimeoutError` where it takes too long, `BadAnswer` where what comes is no answer (with
    `is_away` where nobody is there), `NeverAnswered` where this request will never have one.
    """

    url: str

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        """Return the answers that are asked for; blocks until all of them have ended."""
        ...

    def score(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first, at temperature 1."""
        ...

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        """End requests where they are; all their answers come with what they have."""
        ...

    def pause(self) -> None:
        """Let what is under way stand still."""
        ...

    def update(self, files: Sequence[str], version: int) -> None:
        """Take other weights while paused.

        Args:
            files: safetensors that the engine's machine can read, all tensors by their Hugging Face names.
            version: what answers say of them.
        """
        ...

    def resume(self) -> None:
        """Go on, with what was kept of the weights before computed anew."""
        ...

    def is_healthy(self) -> bool:
        """Return whether it answers, its model loaded."""
        ...


class ServerCalls:
    """Calls of the paths of one server.

    Args:
        url: the address, without a path.
        key_env: variable of the environment with the key; none is sent where it is not set.
        answer_s: how long an answer may take.
    """

    def __init__(self, url: str, key_env: str, answer_s: float) -> None:
        self.url, self._key_env, self._answer_s = url.rstrip("/").removesuffix("/v1"), key_env, answer_s
        self._opened: dict[float, Transport] = {}
        self._lock = threading.Lock()

    def ask(self, path: str, payload: Mapping[str, Any]) -> Any:
        """Return the JSON of an answer that may take long."""
        return self._read(path, self._within(self._answer_s).post(payload, path[1:]))

    def tell(self, path: str, payload: Mapping[str, Any] | None = None) -> Any:
        """Return what the server says to an order."""
        return self._read(path, self._within(CONTROL_S).post(payload or {}, path[1:]))

    def look(self, path: str) -> Any:
        """Return what the server tells of itself."""
        return self._read(path, self._within(LOOK_S).get(path[1:]))

    def is_there(self, path: str) -> bool:
        """Return whether a path is answered with 200."""
        try:
            return self._within(LOOK_S).get(path[1:]).status == 200
        except (BadAnswer, TimeoutError):
            return False

    def _within(self, limit_s: float) -> Transport:
        """Return what asks within a time; all paths share its connections."""
        with self._lock:
            if limit_s not in self._opened:
                self._opened[limit_s] = Transport(f"{self.url}/", self._key_env, limit_s,
                                                  max_bytes=MAX_ANSWER_BYTES)
            return self._opened[limit_s]

    def _read(self, path: str, came: Any) -> Any:
        if came.status == 200:
            try:
                return json.loads(came.body) if came.body.strip() else None
            except RecursionError:
                raise BadAnswer(f"{self.url}{path}: answered JSON that is nested too deep") from None
            except ValueError:
                # some servers answer an order in plain words
                return came.body.decode(errors="replace")
        said = f"{self.url}{path} answered HTTP {came.status}: {reason_of(came.body) or 'without a reason'}"
        if came.status in (400, 404, 413, 422):
            raise NeverAnswered(said)
        # an engine whose process has died says 500 to everybody until it is started again
        raise BadAnswer(said, is_away=came.status >= 500)


def check_answers(answers: list[TokenAnswer], asked: int, where: str) -> list[TokenAnswer]:
    """Return answers, as many as were asked for, whose parts belong together.

    Raises:
        BadAnswer: there are more or fewer, or the parts do not.
    """
    if len(answers) != asked:
        raise BadAnswer(f"{where}: told {len(answers)} answers, and was asked for {asked}")
    for answer in answers:
        _check_answer(answer, where)
    return answers


def _check_answer(answer: TokenAnswer, where: str) -> None:
    count = len(answer.tokens)
    if len(answer.logprobs) != count:
        raise BadAnswer(f"{where}: told {count} tokens and {len(answer.logprobs)} log-probabilities; one "
                        "belongs to each")
    # not the other way round, which NaN would pass
    if not all(logprob > NO_LOGPROB for logprob in answer.logprobs):
        raise BadAnswer(f"{where}: drew a token to which it gives no probability: its model computes no "
                        "numbers")
    if answer.reason not in (STOP, LENGTH, ABORTED):
        raise BadAnswer(f"{where}: ended an answer with {answer.reason!r}")
    ends = [span.end for span in answer.versions]
    # ends that go back would give a token to two versions
    if answer.versions and ([span.start for span in answer.versions] != [0, *ends[:-1]] or ends[-1] != count
                            or ends != sorted(ends) or ends[0] < 0):
        raise BadAnswer(f"{where}: told versions of {[(s.start, s.end) for s in answer.versions]}, and wrote "
                        f"{count} tokens")


def version_of(told: Any) -> int:
    """Return the version that a server tells; weights of its own start have a name of its own."""
    version = int(told) if isinstance(told, (int, str)) and str(told).isdigit() else LOADED
    if version >= _INT32:
        raise ValueError("a version of the weights that is too large")
    return version


def whole_ids(told: Iterable[Any]) -> list[int]:
    """Return token ids; a share of one is none, and is not rounded to another.

    Raises:
        ValueError: something else is among them.
    """
    ids = list(told)
    if strangers := [value for value in ids if type(value) is not int or not 0 <= value < _INT32]:
        raise ValueError(f"{str(strangers[0])[:40]!r} is no token id")
    return ids


class AnswerReading:
    """Makes of whatever is wrong with an answer a `BadAnswer`: a server may send anything."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadAnswer):
            raise BadAnswer(f"{self._url}: the answer cannot be read ({type(error).__name__}: {error})"
                            ) from None
