"""A generator turns items into samples; it asks models through `Ask` alone.

A generator is ordinary code that runs from top to bottom for one item.  It keeps no state of its own: after a
kill the item is made again from its beginning, and each request that was answered before is answered from the
run's `answers.sqlite`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, get_args

from annotated_types import Ge, Le

from data_prep.synth.replies import NoReply, NoUsableReply, Reply, fault_of, read_reply
from data_prep.synth.templates import PromptTemplate, read_prompts
from megatron_sov.base.digests import hash_file
from megatron_sov.judge.rewards.judge import build_fenced_messages, parse_grade, replace_surrogates
from megatron_sov.work.endpoints.answers import BadAnswer, EndpointUnavailable, RequestRefused

Temperature = Annotated[float, Ge(0), Le(2)]
"""Of a model that writes."""
Grade = Annotated[float, Ge(0), Le(10)]
"""Least grade of a judge; 0: none is asked."""
T = TypeVar("T")
Kind = Literal["text", "chat", "prompt", "task"]
"""text: a document with `text`, for pretraining; chat: a conversation with `messages` and, if it has tools,
`tools`, for `sft`; prompt: `prompt` and the fields of its reward, for `rl generate`; task: a task of a tool
environment."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SampleVerdict:
    """What one check says of one sample."""

    check: str
    """Name of the check; the same for all samples that it refuses."""
    passed: bool
    """Whether the sample may be kept as far as this check is concerned."""
    detail: str = ""
    """Figures or words for a reader; not needed to understand `check`."""


@dataclass(frozen=True)
class GeneratedSample:
    """One sample with its checks; it is kept when all of them pass."""

    record: Mapping[str, Any]
    """In the form of the generator's `kind`, without provenance, which the run adds."""
    verdicts: tuple[SampleVerdict, ...] = ()
    """Of the generator's own checks, in the order in which they ran; the first that fails is the reason."""
    group: str = ""
    """What it shares with others of its item, such as a problem with several solutions; empty: nothing."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures beside the record, not for training: plain JSON values."""

    @property
    def failed(self) -> SampleVerdict | None:
        """Return the first check that it does not pass; None where it is kept."""
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)

    @property
    def reason(self) -> str:
        """Return the name of the first check that it does not pass; empty where it is kept."""
        return self.failed.check if self.failed else ""


def writable(sample: GeneratedSample) -> GeneratedSample:
    """Return a sample as it is if a line of JSON in UTF-8 can hold it; otherwise a sample without a record
    that fails the check `form`: a model may write half of a character as an escape, or an infinite number."""
    try:
        json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        why = "holds half of a surrogate pair, which is no character"
    except (ValueError, RecursionError):  # JSON's own
        why = "holds a number that is none, or is nested too deep"
    else:
        return sample
    return GeneratedSample({}, (SampleVerdict("form", False, why),))


@dataclass(frozen=True)
class GeneratorItem:
    """What a generator starts from: a document, a seed problem, a task, or only a number."""

    id: str
    """The same in every run over the same input; letters, digits and :._/- alone."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    source: str = ""
    """Name of the source or file that it comes from, for provenance."""
    licence: str = ""
    """Of what it was made from; empty: not stated."""


MAX_ATTEMPTS = 3
"""For an answer of use; each with another seed, and kept like any answer."""
Role = Literal["writer", "judge"]
"""writer: the model of --engine; judge: that of --judge-engine, which is the writer where none is named."""
Drawn = Reply | NoUsableReply
"""What comes of one draw."""
JUDGE_MAX_TOKENS = 1024
JUDGE_RETRY_TEMPERATURE = 0.5
"""The likeliest answer stays what it is; another one is wanted."""


class Door(Protocol):
    """One model behind an endpoint, or behind a test's."""

    @property
    def model(self) -> str:
        """Return the model's name, as the endpoint calls it."""
        ...

    def key(self, payload: Mapping[str, Any]) -> str:
        """Return the hash of a request."""
        ...

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the answer; raises as `Endpoint.ask` does."""
        ...


class Ask:
    """The door to models, for one item; any method may raise `NoReply`.

    Args:
        item_id: of the item; part of every seed.
        prompts: templates by name.
        doors: role -> model.
        over: maps a function over draws; a run gives one that asks several at a time.
        judge_max_tokens: of a judge's answer.
    """

    def __init__(self, item_id: str, prompts: Mapping[str, PromptTemplate], doors: Mapping[Role, Door],
                 over: Callable[[Callable[[int], Drawn], Iterable[int]], Iterator[Drawn]] = map,
                 judge_max_tokens: int = JUDGE_MAX_TOKENS) -> None:
        self._judge_max_tokens = judge_max_tokens
        self._item_id, self._prompts, self._doors, self._over = item_id, prompts, doors, over
        self.asked: dict[str, None] = {}
        """Keys of all answers that were used, in the order in which they were."""
        self.writers: dict[str, None] = {}
        """Names of the models that wrote the answers in `asked`, judges not included."""
        self.failure: Exception | None = None
        """Why a question was not answered; its item is not done, whatever is made of it."""

    def __call__(self, template: str, given: Mapping[str, Any] | None = None, /, *, count: int = 1,
                 first: int = 0, role: Role = "writer",
                 temperature: float = 0.7, top_p: float = 1.0, max_tokens: int = 1024,
                 thinking: bool | None = None, attempts: int = MAX_ATTEMPTS, **fields: Any) -> list[Reply]:
        """Return answers to a prompt of the generator, each drawn with a seed of its own.

        A draw without an answer of use is left out; where all are, that raises `NoUsableReply`.

        Args:
            template: name of the prompt, such as "autoif/response".
            given: fields of the prompt, in the place of `fields`.
            count: draws.
            first: number of the first draw, where the draws of one question are asked for in several calls.
            role: which model.
            temperature: of sampling; 0: the likeliest.
            top_p: share of probability that is sampled from.
            max_tokens: that an answer may have.
            thinking: whether a reasoning model thinks first; None: as it does by itself.
            attempts: answers to a draw, each with another seed, before none is of use; 1 where an answer of
                no use is an answer too, as in a measurement.
            fields: of the prompt.
        """
        # the request without model and seed: `_one` adds both
        messages = self._prompts[template].messages(fields if given is None else given)
        request = _request(messages, temperature, top_p, max_tokens, thinking)

        def drawn(draw: int) -> Drawn:
            try:
                return self._reply(role, request, template, draw, attempts)
            except NoUsableReply as e:  # one draw, not the others of its question
                return e

        # replies come back in the order of draws, so that `asked` does not depend on which thread was first
        found = list(self._over(drawn, range(first, first + count)))
        replies = [one for one in found if isinstance(one, Reply)]
        if not replies and found and isinstance(found[-1], NoUsableReply):
            raise found[-1]
        for reply in replies:
            self._record_use(reply, role)
        return replies

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
             draw: int = 0, temperature: float = 0.7, max_tokens: int = 1024,
             thinking: bool | None = None) -> Reply:
        """Return the next message of a conversation; `draw` tells equal requests apart."""
        request = _request(messages, temperature, 1.0, max_tokens, thinking)
        if tools:
            request["tools"] = [dict(tool) for tool in tools]
        reply = self._reply("writer", request, "", draw, MAX_ATTEMPTS)
        self._record_use(reply, "writer")
        return reply

    def judge(self, rubric: str, material: Mapping[str, str]) -> float:
        """Return the judge's grade from 0 to 10 of texts, which it is told not to obey.  An answer without a
        sound grade is none, and not 0: another one is asked for."""
        door = self._doors["judge"]
        messages = build_fenced_messages(door.model, replace_surrogates(rubric),
                                         {name: replace_surrogates(text) for name,
                                          text in material.items()}, 0.0, 10.0)
        num_cut = 0
        for attempt in range(MAX_ATTEMPTS):
            # the first grade is the likeliest answer; sampling is for the retry alone
            request = _request(messages, JUDGE_RETRY_TEMPERATURE if attempt else 0.0, 1.0,
                               self._judge_max_tokens, None)
            reply = self._one("judge", request, "", 0, attempt)
            if reply.is_cut:
                num_cut += 1
                continue
            try:
                score, _ = parse_grade(reply.text, 0.0, 10.0)
            except BadAnswer:
                continue
            self._record_use(reply, "judge")
            return score
        cut = (f", {num_cut} of them cut off at {self._judge_max_tokens:,} tokens; raise --judge-max-tokens, "
               "or take a judge that does not think first" if num_cut else "")
        raise NoUsableReply(f"the judge gave no score in {MAX_ATTEMPTS} answers{cut}")

    def _record_use(self, reply: Reply, role: Role) -> None:
        self.asked[reply.key] = None
        if role == "writer":
            self.writers[reply.model or self._doors[role].model] = None

    def _reply(self, role: Role, request: Mapping[str, Any], template: str, draw: int,
               attempts: int) -> Reply:
        fault = ""
        for attempt in range(attempts):
            # the attempt is part of the seed: the same request would get the same answer from the cache
            reply = self._one(role, request, template, draw, attempt)
            if not (fault := fault_of(reply)):
                return reply
        raise NoUsableReply(f"{attempts} answers were of no use, the last: {fault}")

    def _one(self, role: Role, request: Mapping[str, Any], template: str, draw: int, attempt: int) -> Reply:
        door = self._doors[role]
        # the seed is in the payload, and so in the key: a draw is the same request in every run
        payload = {"model": door.model, **request, "seed": _seed(self._item_id, template, draw, attempt)}
        key = door.key(payload)
        try:
            return door.ask(payload, lambda raw: read_reply(raw, key, request.get("tools", ())))
        except RequestRefused as e:
            raise NoUsableReply(str(e)) from None
        except Exception as e:
            # A bad answer or a timeout concerns this item, an endpoint that is gone the whole run. It is kept
            # as well as raised, since a generator may catch it and go on.
            is_wanting = isinstance(e, (BadAnswer, TimeoutError)) and not isinstance(e, EndpointUnavailable)
            self.failure = NoReply(str(e)) if is_wanting else e
            raise self.failure from None


def _request(messages: Sequence[Mapping[str, Any]], temperature: float, top_p: float, max_tokens: int,
             thinking: bool | None) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": _sound([dict(message) for message in messages]),
                               "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    if thinking is not None:  # as vLLM and ours take it
        request["chat_template_kwargs"] = {"enable_thinking": thinking}
    return request


def _sound(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as UTF-8 can hold them: half of a surrogate pair becomes a question mark."""
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        found: list[dict[str, Any]] = json.loads(replace_surrogates(text))
        return found
    return messages


def _seed(*parts: object) -> int:
    """Return a seed from 0 to 2**31 - 1 that follows from the parts of a request."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    # without the sign bit, so that it fits a signed number of 32 bits
    return int.from_bytes(digest[:4], "big") >> 1


class Generator(ABC):
    """One kind of data, with its settings."""

    name: ClassVar[str]
    """As `sov-data synth NAME` calls it."""
    version: ClassVar[int] = 1
    """Raised when the same answers would give other samples."""
    kind: Kind
    """Form of its records; of the class, or set by the settings of one."""
    help: ClassVar[str]
    """One line for `sov-data synth --list`."""
    prompts_file: ClassVar[Path | None] = None
    """YAML file of its prompts, of a generator that is written in Python."""
    help_of_settings: ClassVar[Mapping[str, str]] = {}
    """Setting -> help in `--list`, of a generator that is a file."""
    libraries: ClassVar[Sequence[str]] = ()
    """Modules that it needs and that not every installation has."""
    needs_input: ClassVar[bool] = True
    """Whether it makes nothing without an input."""
    Settings: ClassVar[type[Any]]
    """Frozen dataclass whose types carry the bounds, with `problems() -> list[Problem]` for rules between
    settings."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def prompts(cls) -> dict[str, PromptTemplate]:
        """Read the prompts, as NAME/PROMPT; raises `UserError` where the file cannot be used."""
        return read_prompts(cls.prompts_file) if cls.prompts_file else {}

    @classmethod
    def digests(cls) -> dict[str, str]:
        """Return name -> hash of the file with its prompts."""
        return {cls.prompts_file.name: hash_file(cls.prompts_file)} if cls.prompts_file else {}

    def files(self) -> Sequence[Path]:
        """Return files beside the input that samples depend on, such as the constraints of `autoif`."""
        return ()

    @abstractmethod
    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the items of the inputs, in order.

        Raises:
            UserError: an input cannot be read; the sentence names file and line.
        """

    @abstractmethod
    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the samples of one item, those that fail a check as well.

        Must be a function of the item, the settings and the answers alone.
        """
