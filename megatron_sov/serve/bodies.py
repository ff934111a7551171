"""Parse request bodies in OpenAI's and vLLM's format, and encode their prompts.

Unknown fields that would change the answer are refused by name, never ignored.
"""

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

MAX_CHARS = 2000
"""Longest error message; messages may quote the request."""
MAX_SEQUENCES, MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS = 128, 16, 500, 128
"""Limits per request: answers, stop strings, characters in a stop string, stop ids."""
MIN_TEMPERATURE = 0.01
"""Smallest temperature above 0: dividing logits by less overflows."""
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` for `/v1/completions`, as in OpenAI's API."""
IGNORED_FIELDS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                  "service_tier", "store", "request_id"}
"""Accepted fields that do not change answers."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,),
    "logit_bias": ({},), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "logprobs": (False,), "top_logprobs": (0,), "return_token_ids": (False,), "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "skip_special_tokens": (True,),
    "add_generation_prompt": (True,), "tool_choice": ("auto", "none")}
"""Unsupported field -> values that are accepted because they have no effect; `tool_choice` "none" removes the
tools from the prompt."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
# fail_fast: pydantic's report per error takes a thousand times the bytes of an element
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
StopIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]],
                    Field(max_length=MAX_STOP_IDS, fail_fast=True)]
Decode = Callable[[list[int]], str]


class RefusedRequest(Exception):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Cut the message to `MAX_CHARS`.

        Args:
            status: HTTP status.
            message: problem and fix in a sentence.
            param: field with the problem.
            code: OpenAI's error code.
        """
        super().__init__(message if len(message) <= MAX_CHARS else f"{message[:MAX_CHARS]}...")
        self.status, self.param, self.code = status, param, code

    def format_body(self) -> str:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return json.dumps({"error": {"message": str(self), "type": kind, "param": self.param,
                                     "code": self.code}})


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed request body."""

    prompts: tuple[Conversation | str | tuple[int, ...], ...]
    """A single conversation, or texts or token ids to continue."""
    num_choices: int
    """Answers per prompt."""
    sampling: Sampling
    """Sampling settings; each answer gets its `max_new_tokens`, and its choice index as random stream."""
    max_tokens: int | None
    """Longest answer; None for the remaining context."""
    stops: tuple[str, ...]
    """Stop strings."""
    stop_ids: tuple[int, ...]
    """Stop tokens in addition to the model's stop tokens."""
    ignore_eos: bool
    """Continue after the model's stop tokens."""
    is_stream: bool
    include_usage: bool
    """End a stream with token counts."""

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompts[0], Conversation)

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Tools in the prompt."""
        first = self.prompts[0]
        return first.tools if isinstance(first, Conversation) else ()

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices


def _check_few_options(options: Any) -> Any:
    if isinstance(options, dict) and len(options) > 10:
        raise ValueError("too many names")
    return options


class _Body(BaseModel):
    """Fields of both chat and text completions."""

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
    # obfuscation pads chunks against eavesdroppers; this server sends no padding
    stream_options: Annotated[dict[Literal["include_usage", "include_obfuscation"], bool],
                              BeforeValidator(_check_few_options)] = {}

    def build_request(self, prompts: tuple[Any, ...], max_tokens: int | None) -> CompletionRequest:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise RefusedRequest(400, f"temperature is {self.temperature:g}: below {MIN_TEMPERATURE:g} "
                                      "numbers overflow; use 0 for the most probable token", "temperature")
        if len(prompts) * self.n > MAX_SEQUENCES:
            raise RefusedRequest(400, f"{len(prompts)} prompts with n = {self.n} are {len(prompts) * self.n} "
                                      f"answers, at most {MAX_SEQUENCES}; send several requests", "n")
        # without a seed, equal requests get different samples
        seed = secrets.randbits(63) if self.seed is None else self.seed
        sampling = Sampling(temperature=self.temperature, top_k=max(self.top_k, 0), top_p=self.top_p,
                            seed=seed)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        includes_usage = self.stream_options.get("include_usage", False)
        return CompletionRequest(prompts, self.n, sampling, max_tokens, stops, tuple(self.stop_token_ids),
                                 self.ignore_eos, self.stream, includes_usage)


class _ChatBody(_Body):
    messages: Objects
    tools: Objects = []
    chat_template_kwargs: dict[str, Any] = {}
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None


class _CompletionBody(_Body):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: Count = DEFAULT_COMPLETION_TOKENS


def parse_chat_body(raw: bytes, model: str) -> CompletionRequest:
    """Parse a body for `/v1/chat/completions`; `model` is the served name.

    Raises:
        RefusedRequest: malformed JSON, or unsupported fields.
    """
    fields = _parse_fields(raw)
    shows_tools = fields.get("tool_choice") != "none"
    body: _ChatBody = _validate_body(_ChatBody, fields, model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RefusedRequest(400, f"max_tokens is {body.max_tokens} and max_completion_tokens is "
                                  f"{body.max_completion_tokens}; send one of them", "max_tokens")
    try:
        tools = parse_tools_and_kwargs(body.tools if shows_tools else None, body.chat_template_kwargs)
        chat = Conversation(parse_messages(body.messages, "messages"), **tools)
    except BadRecord as e:
        raise RefusedRequest(400, f"the conversation is refused: {e}", "messages") from None
    for number, message in enumerate(chat.messages):
        if message.unread:
            unknown = message.unread[0][:200]
            raise RefusedRequest(400, f"messages[{number}] has {unknown!r}, which is not known"
                                      f"{suggest_name(unknown, MESSAGE_FIELDS)}; leave it out", "messages")
    return body.build_request((chat,), body.max_completion_tokens or body.max_tokens)


def parse_completion_body(raw: bytes, model: str) -> CompletionRequest:
    """Parse a body for `/v1/completions`; see `parse_chat_body`."""
    body: _CompletionBody = _validate_body(_CompletionBody, _parse_fields(raw), model)
    values: Any = body.prompt
    if isinstance(values, str) or (values and isinstance(values[0], int)):
        values = [values]
    prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in values)
    if not prompts or not all(prompts):
        raise RefusedRequest(400, "prompt is empty; send at least one character or token", "prompt")
    return body.build_request(prompts, body.max_tokens)


def _parse_fields(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object, without null fields."""
    try:
        fields = json.loads(raw, parse_constant=reject_constant, parse_float=parse_finite)
    except (ValueError, RecursionError) as e:
        raise RefusedRequest(400, f"the body is not valid JSON ({e}); send one object in UTF-8") from None
    if not isinstance(fields, dict):
        raise RefusedRequest(400, f"the body is a JSON {type(fields).__name__}; send an object")
    try:
        check_depth(fields)
        # finds lone surrogates, which UTF-8 and tokenizers cannot encode
        json.dumps(fields, ensure_ascii=False).encode()
    except BadRecord as e:
        raise RefusedRequest(400, f"the body {e}") from None
    except UnicodeEncodeError:
        raise RefusedRequest(400, "the body holds half of a surrogate pair, which is no text; write it in "
                                  "UTF-8") from None
    return {name: value for name, value in fields.items() if value is not None}


def _validate_body(kind: type[Any], fields: Mapping[str, Any], model: str) -> Any:
    neutral = {name: values for name, values in NEUTRAL_VALUES.items() if name not in kind.model_fields}
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            accepted = " or ".join(json.dumps(value) for value in values)
            raise RefusedRequest(400, f"{name} is {_format_value(fields[name])}: this server does nothing "
                                      f"with it but for {accepted}; leave it out", name)
    supported = {name: value for name, value in fields.items() if name not in IGNORED_FIELDS | set(neutral)}
    # the first unknown field alone: pydantic stores a report per field
    unknown = next((name[:200] for name in supported if name not in kind.model_fields), None)
    if unknown is not None:
        names = [*kind.model_fields, *NEUTRAL_VALUES, *IGNORED_FIELDS]
        raise RefusedRequest(400, f"{unknown} is not known{suggest_name(unknown, names)}; leave it out",
                             unknown)
    try:
        body = kind.model_validate(supported)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        name = str(error["loc"][0])
        if error["type"] == "missing":
            raise RefusedRequest(400, f"{name} is missing; send it", name) from None
        raise RefusedRequest(400, f"{name} is {_format_value(fields[name])}: {error['msg'][:200]}",
                             name) from None
    if body.model not in (None, model):
        raise RefusedRequest(404, f"model {body.model[:200]!r} does not exist; this server has {model!r}",
                             "model", "model_not_found")
    return body


def _format_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True)
class EncodedRequest:
    """A request's prompts as token ids."""

    prompts: list[list[int]]
    end_ids: tuple[int, ...]
    """Stop tokens."""
    limits: list[int]
    """Longest answer per prompt."""
    in_thoughts: bool
    """Whether the chat template opened the answer's thoughts."""


class RequestEncoder:
    """Encodes requests with a model's tokenizer and chat template, on the main thread: only there a
    template's time and memory are limited."""

    def __init__(self, target: Target, max_length: int) -> None:
        """Load tokenizer and chat template.

        Args:
            target: the model.
            max_length: longest prompt with its answer, in tokens.

        Raises:
            UserError: no readable tokenizer.
        """
        folder = target.tokenizer_folder
        self._folder, self._vocab_size, self._max_length = folder, target.vocab_size, max_length
        self._plain = PromptEncoder(target, chat=False)
        self._chat = PromptEncoder(target, chat=True) if read_chat_encoder(folder) is not None else None
        encoder = None if self._chat is None else self._chat.encoder
        self.call_form = None if encoder is None else encoder.find_call_form()[0]
        """Format of the model's tool calls; None if the template does not show it."""
        self._tokenizer = open_tokenizer(folder)
        self._special_ids = {token.content: id_ for id_, token
                             in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    @property
    def has_chat(self) -> bool:
        return self._chat is not None

    def encode_request(self, request: CompletionRequest) -> EncodedRequest:
        """Encode the prompts.

        Raises:
            RefusedRequest: refused by the template, too long, or with unknown ids.
        """
        encoder, field = self._plain, "prompt"
        if request.is_chat:
            if self._chat is None:
                raise RefusedRequest(400, "this model has no chat template; ask /v1/completions")
            encoder, field = self._chat, "messages"
        try:
            prompts = [_encode_prompt(encoder, prompt) for prompt in request.prompts]
        except UserError as e:
            # hide folders on this machine from clients
            raise RefusedRequest(400, str(e).replace(str(self._folder), "the tokenizer"), field) from None
        for ids in prompts:
            if not ids or not all(0 <= id_ < self._vocab_size for id_ in ids):
                raise RefusedRequest(400, "a prompt must have at least one token, and ids below "
                                          f"{self._vocab_size}", field)
        # special tokens never show in decoded text: stop by id
        special_ids = [self._special_ids[text] for text in request.stops if text in self._special_ids]
        model_ids = () if request.ignore_eos else encoder.end_ids
        template = encoder.encoder
        in_thoughts = template is not None and bool(template.opened_thoughts(prompts[0]))
        return EncodedRequest(prompts, tuple(sorted({*model_ids, *special_ids, *request.stop_ids})),
                              [self._compute_limit(request, len(ids), field) for ids in prompts], in_thoughts)

    def list_text_stops(self, request: CompletionRequest) -> tuple[str, ...]:
        """Return the stop strings without special tokens."""
        return tuple(text for text in request.stops if text not in self._special_ids)

    def get_decoder(self, request: CompletionRequest) -> Decode:
        """Return the function from token ids to text (`chat.marks.build_text_decoder`)."""
        if request.is_chat and self._chat is not None:
            return self._chat.decode
        return lambda ids: unquote_marks(self._plain.decode(ids))

    def _compute_limit(self, request: CompletionRequest, prompt_tokens: int, field: str) -> int:
        room = self._max_length - prompt_tokens
        limit = room if request.max_tokens is None else request.max_tokens
        if room < 1 or limit > room:
            answer = f" and {request.max_tokens} of the answer" if request.max_tokens else ""
            raise RefusedRequest(400, f"the prompt has {prompt_tokens} tokens{answer}, and this server takes "
                                      f"{self._max_length} in all; shorten one of them", field,
                                 "context_length_exceeded")
        return limit


def _encode_prompt(encoder: PromptEncoder, prompt: Conversation | str | tuple[int, ...]) -> list[int]:
    """Encode a prompt with earlier answers as in training. If the template drops part of an answer, such as
    thoughts, which training refuses, encode the answers as the template shows them.

    Raises:
        UserError: the template refuses the conversation, or invalid text.
    """
    if isinstance(prompt, tuple):
        return list(prompt)
    try:
        return encoder.encode_prompts([prompt])[0]
    except UserError:
        if isinstance(prompt, str) or all(message.role != "assistant" for message in prompt.messages):
            raise
    messages = tuple(replace(message, is_learned=False) for message in prompt.messages)
    return encoder.encode_prompts([replace(prompt, messages=messages)])[0]
