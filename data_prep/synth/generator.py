"""What a generator is: items in, samples out, and everything that it asks goes through one door.

A generator is ordinary code that runs from top to bottom for one item.  It keeps no state of its own: when
a run is killed the item is made again from its beginning, and what was asked before is answered from what is
kept.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from annotated_types import Ge, Le

from data_prep.synth.templates import PROMPTS, PromptTemplate, load_prompts
from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.base.documents.rows import finite, no_constant
from megatron_sov.chat.marks import BEGIN_THOUGHTS, END_THOUGHTS, as_written, plain_form
from megatron_sov.chat.tool_calls import BadCall, parse_turn
from megatron_sov.judge.rewards.judge import fenced_messages, grade_in, sound
from megatron_sov.judge.rewards.surface import loop_at_end
from megatron_sov.work.endpoints.answers import BadAnswer, EndpointUnavailable, NeverAnswered, answering_model

Temperature = Annotated[float, Ge(0), Le(2)]
"""Of a model that writes."""
Grade = Annotated[float, Ge(0), Le(10)]
"""Least grade of a judge; 0: none is asked."""
T = TypeVar("T")

# What is made: a record of an ordinary source, and what was checked of it.

Kind = Literal["text", "chat", "prompt", "task"]
"""text: a document with `text`, for pretraining; chat: a conversation with `messages` and, where it has
tools, `tools`, for `sft`; prompt: `prompt` and what its reward needs, for `rl generate`; task: a task of a
tool environment."""


@dataclass(frozen=True)
class SampleVerdict:
    """What one check says of one sample."""

    check: str
    """Name of the check; the same for all samples that it refuses."""
    passed: bool
    """Whether the sample may be kept as far as this check is concerned."""
    detail: str = ""
    """What it has seen, for a reader; not needed to understand `check`."""


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
    """Figures for the report and for difficulty, not for training: plain JSON values."""
    kind: Kind | None = None
    """Form of this record where it is another one than the generator's; None: the generator's."""

    @property
    def reason(self) -> str:
        """Return the name of the first check that it does not pass; empty where it is kept."""
        return next((verdict.check for verdict in self.verdicts if not verdict.passed), "")


def writable(sample: GeneratedSample) -> GeneratedSample:
    """Return a sample as it is where a line of JSON in UTF-8 can hold it; otherwise one without a record
    that says why not: a model may write half of a character as an escape, or a number without end."""
    try:
        # What a line of the journal cannot hold becomes a verdict here; later it would end the whole run.
        json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        why = "holds half of a surrogate pair, which is no character"
    except (ValueError, RecursionError):  # JSON's own
        why = "holds a number that is none, or is nested too deep"
    else:
        return sample
    return GeneratedSample({}, (SampleVerdict("form", False, why),), kind=sample.kind)


# Who makes it, of what.

MAX_ATTEMPTS = 3
"""For an answer of use; each with another seed, and kept like any answer."""
Role = Literal["writer", "judge"]
"""writer: the model of --engine; judge: that of --judge-engine, which is the writer where none is named."""


@dataclass(frozen=True)
class GeneratorItem:
    """What a generator starts from: a document, a seed problem, a task, or only a number."""

    id: str
    """The same in every run over the same input; letters, digits and :._- alone."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the generator needs of it: plain JSON values."""
    source: str = ""
    """Name of the source or file that it comes from, for provenance."""
    licence: str = ""
    """Of what it was made from; empty: not stated."""


@dataclass(frozen=True)
class Reply:
    """One answer of a model."""

    text: str
    """Without thoughts."""
    thinking: str = ""
    """What it thought first, where the endpoint tells it or it stands between think tags."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`name` and `arguments` (decoded) of each call; one that is malformed has `error` as well, a sentence
    for the model, and no arguments."""
    is_cut: bool = False
    """Whether it ended at the limit of tokens."""
    key: str = ""
    """Hash of what was asked, for provenance."""
    model: str = ""
    """Name of the model that answered, as the endpoint states it; empty: not stated."""


class NoReply(Exception):
    """A model did not answer in spite of all attempts: the item is left for a later run."""


class NoUsableReply(NoReply):
    """A model answered, and all of it was empty, a loop or no grade: a later run would get the same, so
    the item is done and has no samples."""


MIN_LOOP_REPEATS = 8
MIN_LOOP_CHARS = 200
"""What a text must repeat at its end to count as a loop: more than any verse or table does."""
Drawn = Reply | NoUsableReply
"""What comes of one draw."""
JUDGE_MAX_TOKENS = 1024
"""Of a judge's answer, unless told."""
JUDGE_RETRY_TEMPERATURE = 0.5
"""The likeliest answer stays what it is; another one is wanted."""


# What a chat completion says: text, thoughts and calls of tools, read strictly, and whether it is of use.


def read_reply(answer: Any, key: str = "", tools: Sequence[dict[str, Any]] = ()) -> Reply:
    """Return the one choice of a chat completion.

    Args:
        answer: decoded JSON.
        key: hash of what was asked.
        tools: that were offered, so that calls may stand in the text.

    Raises:
        BadAnswer: it is no chat completion of one choice.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("the endpoint's answer must have one of 'choices', for one was asked for")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise BadAnswer("the endpoint's answer has no message")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise BadAnswer("the endpoint's message has a content that is no text")
    said = message.get("tool_calls") or []
    if not isinstance(said, list):
        raise BadAnswer("the endpoint's tool_calls are no list")
    text, thinking = _split(content or "")
    # servers name the field in two ways; thoughts that were found in the text are the fallback
    told = message.get("reasoning_content") or message.get("reasoning")
    thinking = told.strip() if isinstance(told, str) and told.strip() else thinking
    calls = [_call(one) for one in said]
    if tools and not calls:  # a server without a parser of calls leaves them in the text
        turn = parse_turn(text, tools=tools)
        text = turn.content
        calls = [_malformed("", call.reason) if isinstance(call, BadCall)
                 else {"name": call.name, "arguments": call.arguments} for call in turn.calls]
    return Reply(text, thinking, tuple(calls), choices[0].get("finish_reason") == "length", key,
                 answering_model(answer))


def fault_of(reply: Reply) -> str:
    """Return why an answer is of no use to any generator, in a word; empty where it may be.

    One that was cut off in its thoughts says nothing and is no empty one: another would end there as well.
    """
    if not reply.text and not reply.tool_calls and not reply.is_cut:
        return "empty"
    try:
        json.dumps([reply.text, reply.thinking, reply.tool_calls], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character"
    _, repeats = loop_at_end(reply.text, MIN_LOOP_CHARS)
    return "loop" if repeats >= MIN_LOOP_REPEATS else ""


def _split(content: str) -> tuple[str, str]:
    """Return text and thoughts: thoughts end at the first end tag; without one they reach to the end."""
    text = plain_form(content).strip()
    begins = text.startswith(BEGIN_THOUGHTS)
    before, end, behind = text.partition(END_THOUGHTS)
    # The opening tag may be missing: some chat templates write it into the prompt. One that comes later in
    # the text is a quotation, and the text has no thoughts.
    if end and (begins or BEGIN_THOUGHTS not in before):
        return as_written(behind).strip(), as_written(before.removeprefix(BEGIN_THOUGHTS)).strip()
    if begins:
        return "", as_written(text.removeprefix(BEGIN_THOUGHTS)).strip()
    return as_written(text), ""


def _call(said: Any) -> dict[str, Any]:
    """Return a call's name and arguments, or what is wrong with it."""
    function = said.get("function") if isinstance(said, dict) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return _malformed("", "a tool call must have a function with a name")
    name, arguments = function["name"], function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=no_constant, parse_float=finite)
        refuse_deep(arguments)
    except (ValueError, RecursionError, BadRecord) as e:
        return _malformed(name, f"the arguments of a tool call are no JSON ({str(e)[:100]})")
    if not isinstance(arguments, dict):
        return _malformed(name, "the arguments of a tool call must be an object")
    return {"name": name, "arguments": arguments}


def _malformed(name: str, error: str) -> dict[str, Any]:
    return {"name": name, "arguments": {}, "error": error}


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
        """What kept a question from being answered; its item is not done, whatever is made of it."""

    def __call__(self, template: str, given: Mapping[str, Any] | None = None, /, *, count: int = 1,
                 first: int = 0, role: Role = "writer",
                 temperature: float = 0.7, top_p: float = 1.0, max_tokens: int = 1024,
                 thinking: bool | None = None, attempts: int = MAX_ATTEMPTS, **fields: Any) -> list[Reply]:
        """Return answers to a template of the generator's, each drawn with a seed of its own.

        A draw without an answer of use is left out; where all are, that raises `NoUsableReply`.

        Args:
            template: name of a file of `prompts/` without its ending, such as "autoif/constraints".
            given: fields that a template of a generator's file may name, in the place of `fields`.
            count: draws.
            first: number of the first draw, where the draws of one question are asked for in several calls.
            role: which model.
            temperature: of sampling; 0: the likeliest.
            top_p: share of probability that is sampled from.
            max_tokens: that an answer may have.
            thinking: whether a reasoning model thinks first; None: as it does by itself.
            attempts: answers to a draw, each with another seed, before none is of use; 1 where an answer of
                no use is an answer too, as in a measurement.
            fields: what the template names; exactly these.
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
             role: Role = "writer", draw: int = 0, temperature: float = 0.7, top_p: float = 1.0,
             max_tokens: int = 1024, thinking: bool | None = None) -> Reply:
        """Return the next message of a conversation; `draw` tells equal requests apart."""
        request = _request(messages, temperature, top_p, max_tokens, thinking)
        if tools:
            request["tools"] = [dict(tool) for tool in tools]
        reply = self._reply(role, request, "", draw, MAX_ATTEMPTS)
        self._record_use(reply, role)
        return reply

    def judge(self, rubric: str, material: Mapping[str, str], *, low: float = 0.0,
              high: float = 10.0) -> float:
        """Return the judge's score between `low` and `high` of texts that it is told not to obey.  An answer
        without a sound score is none, and not 0: another one is asked for."""
        door = self._doors["judge"]
        messages = fenced_messages(door.model, sound(rubric),
                                   {name: sound(text) for name, text in material.items()}, low, high)
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
                score, _ = grade_in(reply.text, low, high)
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
            # the attempt is part of the seed: the same request would get the same answer from what is kept
            reply = self._one(role, request, template, draw, attempt)
            if not (fault := fault_of(reply)):
                return reply
        raise NoUsableReply(f"{attempts} answers were of no use, the last: {fault}")

    def _one(self, role: Role, request: Mapping[str, Any], template: str, draw: int, attempt: int) -> Reply:
        door = self._doors[role]
        # The seed is in the payload, and so in the key: a draw is the same request in every run, and is paid
        # once.
        payload = {"model": door.model, **request,
                   "seed": _seed(self._item_id, template, draw, attempt)}
        key = door.key(payload)
        try:
            return door.ask(payload, lambda raw: read_reply(raw, key, request.get("tools", ())))
        except NeverAnswered as e:
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
    if thinking is not None:  # as vLLM, SGLang and ours take it
        request["chat_template_kwargs"] = {"enable_thinking": thinking}
    return request


def _sound(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as UTF-8 can hold them: half of a surrogate pair becomes a question mark."""
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        found: list[dict[str, Any]] = json.loads(sound(text))
        return found
    return messages


def _seed(*parts: object) -> int:
    """Return a seed from 0 to 2**31 - 1 that follows from what is asked."""
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
    templates: ClassVar[Mapping[str, Sequence[str]]]
    """Template -> the fields that it is given; a template that names another one is refused at the start."""
    help_of_settings: ClassVar[Mapping[str, str]] = {}
    """Setting -> what `--list` says of it, of a generator that is a file."""
    digests: ClassVar[Mapping[str, str]] = {}
    """Name of the generator's own file -> hash of its text."""
    libraries: ClassVar[Sequence[str]] = ()
    """Modules that it needs and that not every installation has."""
    needs_input: ClassVar[bool] = True
    """Whether it makes nothing without an input."""
    Settings: ClassVar[type[Any]]
    """Frozen dataclass whose types carry the bounds, with `problems() -> list[Problem]` for rules between,
    where there are any."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def prompts(cls, folders: Sequence[Path] = ()) -> dict[str, PromptTemplate]:
        """Load the templates; `folders`: of the user, which go first.

        Raises:
            UserError: some cannot be used; all of them are named.
        """
        return load_prompts(cls.templates, [*folders, PROMPTS])

    def files(self) -> Sequence[Path]:
        """Return files beside the input that samples depend on, such as a taxonomy."""
        return ()

    @abstractmethod
    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield what there is to do, in order.

        Raises:
            UserError: an input is not what this generator starts from; the sentence names file and line.
        """

    @abstractmethod
    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the samples of one item, those that fail a check as well.

        Must be a function of the item, the settings and the answers alone.
        """
