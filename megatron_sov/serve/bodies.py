"""Bodies of requests as OpenAI and vLLM spell them, read strictly: a field that would change the answer and
is not known here is refused by its name, never passed over.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.messages import (
    MESSAGE_FIELDS, check_depth, parse_messages, parse_tools_and_kwargs)
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.chat.folder import open_tokenizer, read_chat_encoder
from megatron_sov.chat.marks import unquote_marks
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.infer.request import Sampling

# What a server says where it does not answer: OpenAI's object of an error, with its HTTP status.

MAX_CHARS = 2000
"""Of a sentence: it may quote what a client has sent."""


class RefusedRequest(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Take what is said.

        Args:
            status: of HTTP.
            message: one sentence: what is wrong, and what to do.
            param: the field that it is about.
            code: OpenAI's word for it, where there is one.
        """
        super().__init__(message if len(message) <= MAX_CHARS else f"{message[:MAX_CHARS]}...")
        self.status, self.param, self.code = status, param, code

    def body(self) -> str:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return json.dumps({"error": {"message": str(self), "type": kind, "param": self.param,
                                     "code": self.code}})


MAX_SEQUENCES, MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS = 128, 16, 500, 128
"""Answers to one request; strings that end an answer, and their length: each token is searched for them; and
tokens that end one."""
MIN_TEMPERATURE = 0.01
"""Of those above 0: logits that are divided by less leave the range of numbers."""
DEFAULT_COMPLETION_TOKENS = 16
"""Of `/v1/completions` unless told, as OpenAI has it."""
CHANGE_NOTHING = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                  "service_tier", "store", "request_id"}
"""Fields that no answer depends on."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,),
    "logit_bias": ({},), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "logprobs": (False,), "top_logprobs": (0,), "return_token_ids": (False,), "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "skip_special_tokens": (True,),
    "add_generation_prompt": (True,), "tool_choice": ("auto", "none")}
"""Fields that are understood and not done: the values with which they change nothing.  `tool_choice` none
shows the model no tools."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
# the first wrong part of a list ends its reading: what is kept of each takes a thousand times its bytes
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
StopIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]],
                    Field(max_length=MAX_STOP_IDS, fail_fast=True)]


@dataclass(frozen=True)
class ServedQuestion:
    """What a client asks."""

    prompts: tuple[Conversation | str | tuple[int, ...], ...]
    """A conversation; or texts or ids to continue."""
    num_choices: int
    """Answers to each of them."""
    sampling: Sampling
    """How tokens are chosen; each choice has the stream of its number.  How many there may be, `max_tokens`
    says."""
    max_tokens: int | None
    """Longest answer; None: as long as there is room."""
    stops: tuple[str, ...]
    """Strings that end an answer."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer, beside the model's own."""
    ignores_end: bool
    """Whether the model's own tokens end none."""
    is_stream: bool
    """Whether the answer is sent as it is written."""
    tells_usage: bool
    """Whether a stream ends with the numbers of tokens."""

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompts[0], Conversation)

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """That the model is shown and may call."""
        first = self.prompts[0]
        return first.tools if isinstance(first, Conversation) else ()

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices


def _few(options: Any) -> Any:
    """Return options of which there are few; raises ValueError."""
    if isinstance(options, dict) and len(options) > 10:
        raise ValueError("too many names")
    return options


class _Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: StopIds = []
    ignore_eos: bool = False
    stream: bool = False
    # obfuscation is padding against listeners; none is sent
    stream_options: Annotated[dict[Literal["include_usage", "include_obfuscation"], bool],
                              BeforeValidator(_few)] = {}

    def question(self, prompts: tuple[Any, ...], max_tokens: int | None) -> ServedQuestion:
        # 0 is greedy and fine; just above it logits over the temperature are infinite.
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise RefusedRequest(400,
                                 f"temperature is {self.temperature:g}: below {MIN_TEMPERATURE:g} numbers "
                                      "overflow; use 0 for the most probable token", "temperature")
        if len(prompts) * self.n > MAX_SEQUENCES:
            raise RefusedRequest(400, f"{len(prompts)} prompts with n = {self.n} are {len(prompts) * self.n} "
                                      f"answers, at most {MAX_SEQUENCES}; send several requests", "n")
        # Without a seed two equal requests must differ.
        seed = secrets.randbits(63) if self.seed is None else self.seed
        sampling = Sampling(temperature=self.temperature, top_k=max(self.top_k, 0), top_p=self.top_p,
                            seed=seed)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return ServedQuestion(prompts, self.n, sampling, max_tokens, stops, tuple(self.stop_token_ids),
                              self.ignore_eos, self.stream, self.stream_options.get("include_usage", False))


class _ChatBody(_Body):
    messages: Objects
    tools: Objects = []
    chat_template_kwargs: dict[str, Any] = {}
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None


class _CompletionBody(_Body):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: Count = DEFAULT_COMPLETION_TOKENS


def chat_question(raw: bytes, model: str) -> ServedQuestion:
    """Return what the body of a request for `/v1/chat/completions` asks.

    Args:
        raw: the body.
        model: the one name that there is.

    Raises:
        Refused: it is malformed, or asks for what is not done here.
    """
    fields = _fields(raw)
    shows_tools = fields.get("tool_choice") != "none"
    body: _ChatBody = _check_body(_ChatBody, fields, model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RefusedRequest(400, f"max_tokens is {body.max_tokens} and max_completion_tokens is "
                                  f"{body.max_completion_tokens}; send one of them", "max_tokens")
    try:
        chat = Conversation(parse_messages(body.messages, "messages"),
                            **parse_tools_and_kwargs(body.tools if shows_tools else None,
                                                     body.chat_template_kwargs))
    except BadRecord as e:
        raise RefusedRequest(400, f"the conversation is refused: {e}", "messages") from None
    for number, message in enumerate(chat.messages):
        if message.unread:
            unknown = message.unread[0][:200]
            raise RefusedRequest(400, f"messages[{number}] has {unknown!r}, which is not known"
                                      f"{suggest_name(unknown, MESSAGE_FIELDS)}; leave it out", "messages")
    return body.question((chat,), body.max_completion_tokens or body.max_tokens)


def completion_question(raw: bytes, model: str) -> ServedQuestion:
    """Return what the body of a request for `/v1/completions` asks, as `chat_question`."""
    body: _CompletionBody = _check_body(_CompletionBody, _fields(raw), model)
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in given)
    if not prompts or not all(prompts):
        raise RefusedRequest(400, "prompt is empty; send at least one character or token", "prompt")
    return body.question(prompts, body.max_tokens)


def _fields(raw: bytes) -> dict[str, Any]:
    """Return the fields of a body but for those that are null."""
    try:
        fields = json.loads(raw, parse_constant=reject_constant, parse_float=parse_finite)
    except (ValueError, RecursionError) as e:
        raise RefusedRequest(400, f"the body is not valid JSON ({e}); send one object in UTF-8") from None
    if not isinstance(fields, dict):
        raise RefusedRequest(400, f"the body is a JSON {type(fields).__name__}; send an object")
    try:
        check_depth(fields)
        # Finds lone surrogates, which strict UTF-8 cannot write and a tokenizer cannot read.
        json.dumps(fields, ensure_ascii=False).encode()
    except BadRecord as e:
        raise RefusedRequest(400, f"the body {e}") from None
    except UnicodeEncodeError:
        raise RefusedRequest(400,
                             "the body holds half of a surrogate pair, which is no text; write it in UTF-8"
                             ) from None
    return {name: value for name, value in fields.items() if value is not None}


def _check_body(kind: type[Any], fields: Mapping[str, Any], model: str) -> Any:
    # Fields that this server does not follow are taken where their value changes nothing.
    neutral = {name: allowed for name, allowed in NEUTRAL.items() if name not in kind.model_fields}
    known = {name: value for name, value in fields.items() if name not in CHANGE_NOTHING | set(neutral)}
    for name, allowed in neutral.items():
        if name in fields and fields[name] not in allowed:
            raise RefusedRequest(400,
                                 f"{name} is {_show(fields[name])}: this server does nothing with it but "
                                 f"for {' or '.join(json.dumps(value) for value in allowed)}; leave it out",
                                 name)
    # the first alone: of each that pydantic meets it keeps a report
    if unknown := next((name for name in known if name not in kind.model_fields), ""):
        every = [*kind.model_fields, *NEUTRAL, *CHANGE_NOTHING]
        raise RefusedRequest(400,
                             f"{unknown[:200]} is not known{suggest_name(unknown[:200], every)}; leave it "
                             "out",
                             unknown[:200])
    try:
        body = kind.model_validate(known)
    except ValidationError as e:
        # One sentence about the first mistake.
        error = e.errors(include_url=False)[0]
        name = str(error["loc"][0])
        if error["type"] == "missing":
            raise RefusedRequest(400, f"{name} is missing; send it", name) from None
        raise RefusedRequest(400, f"{name} is {_show(fields[name])}: {error['msg'][:200]}", name) from None
    if body.model not in (None, model):
        raise RefusedRequest(404, f"model {body.model[:200]!r} does not exist; this server has {model!r}",
                             "model", "model_not_found")
    return body


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


# Questions as the token ids that a model is asked with, and ids as text again.

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class ReadBody:
    """A question in ids."""

    prompts: list[list[int]]
    """Ids of each prompt."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    limits: list[int]
    """Longest answer to each prompt."""
    in_thoughts: bool
    """Whether the template has opened the thoughts that the answer begins with."""


class BodyReader:
    """A model's tokenizer and template.  Prompts are read on the main thread: only there a template's time
    and memory are bounded."""

    def __init__(self, target: Target, longest: int) -> None:
        """Read both.

        Args:
            target: the model.
            longest: tokens of a prompt and its answer.

        Raises:
            UserError: the model has no tokenizer, or it cannot be read.
        """
        folder = target.tokenizer_folder
        self._where, self._vocab_size, self._longest = folder, target.vocab_size, longest
        self._plain = PromptEncoder(target, chat=False)
        self._chat = PromptEncoder(target, chat=True) if read_chat_encoder(folder) is not None else None
        encoder = None if self._chat is None else self._chat.encoder
        self.call_form = None if encoder is None else encoder.find_call_form()[0]
        """In which the model calls tools; None: its template does not say."""
        self._tokenizer = open_tokenizer(folder)
        self._special = {token.content: id_ for id_, token
                         in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._chat is not None

    def read(self, question: ServedQuestion) -> ReadBody:
        """Return a question in ids.

        Raises:
            Refused: the template refuses it, it is too long, or has ids that the model does not know.
        """
        asker, field = self._plain, "prompt"
        if question.is_chat:
            if self._chat is None:
                raise RefusedRequest(400, "this model has no chat template; ask /v1/completions")
            asker, field = self._chat, "messages"
        try:
            prompts = [_ids(asker, prompt) for prompt in question.prompts]
        except UserError as e:
            # a message may name folders of this machine, which are nothing to clients
            raise RefusedRequest(400, str(e).replace(str(self._where), "the tokenizer"), field) from None
        for ids in prompts:
            if not ids or not all(0 <= id_ < self._vocab_size for id_ in ids):
                raise RefusedRequest(400,
                                     "a prompt must have at least one token, and ids below "
                                     f"{self._vocab_size}",
                                     field)
        # A special token does not show in the text, so it stops by its id.
        ends = [self._special[text] for text in question.stops if text in self._special]
        own_ends = () if question.ignores_end else asker.end_ids
        return ReadBody(prompts, tuple(sorted({*own_ends, *ends, *question.stop_ids})),
                        [self._limit(question, len(ids), field) for ids in prompts],
                        asker.encoder is not None and bool(asker.encoder.opened_thoughts(prompts[0])))

    def stops(self, question: ServedQuestion) -> tuple[str, ...]:
        """Return the strings that end an answer and can show in it: no special tokens."""
        return tuple(text for text in question.stops if text not in self._special)

    def decoder(self, question: ServedQuestion) -> Decode:
        """Return what gives the text of an answer (`chat.marks.build_text_decoder`)."""
        if question.is_chat and self._chat is not None:
            return self._chat.decode
        return lambda ids: unquote_marks(self._plain.decode(ids))

    def _limit(self, question: ServedQuestion, prompt_tokens: int, field: str) -> int:
        # Without a limit of the client's, the answer may fill what the prompt leaves.
        left = self._longest - prompt_tokens
        wanted = left if question.max_tokens is None else question.max_tokens
        if left < 1 or wanted > left:
            asked = f" and {question.max_tokens} of the answer" if question.max_tokens else ""
            raise RefusedRequest(400, f"the prompt has {prompt_tokens} tokens{asked}, and this server takes "
                                      f"{self._longest} in all; shorten one of them", field,
                                 "context_length_exceeded")
        return wanted


def _ids(asker: PromptEncoder, prompt: Conversation | str | tuple[int, ...]) -> list[int]:
    """Return a prompt in ids: with earlier answers as training has shown them, or, where the template leaves
    something of them out (earlier thoughts, say) and training would refuse them, as the template shows them.

    Raises:
        UserError: the template refuses it, or it is no text.
    """
    if isinstance(prompt, tuple):
        return list(prompt)
    try:
        return asker.encode_prompts([prompt])[0]
    except UserError:
        if isinstance(prompt, str) or all(message.role != "assistant" for message in prompt.messages):
            raise
    shown = tuple(replace(message, is_learned=False) for message in prompt.messages)
    return asker.encode_prompts([replace(prompt, messages=shown)])[0]
