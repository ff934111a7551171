"""Requests to models for an item: seeded draws, chat turns and grades from the judge."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from data_prep.synth.declared.templates import PromptTemplate
from data_prep.synth.replies import NoReply, NoUsableReply, Reply, find_reply_fault, read_reply
from megatron_sov.base.documents.rows import replace_surrogates
from megatron_sov.judge.rewards.judge import build_fenced_messages, parse_grade
from megatron_sov.work.endpoints.answers import BadAnswer, EndpointUnavailable, RequestRefused
from megatron_sov.work.endpoints.endpoint import Endpoint

MAX_ATTEMPTS = 3
"""Requests for a usable reply, with different seeds; the cache stores every answer."""
JUDGE_MAX_TOKENS = 1024
JUDGE_RETRY_TEMPERATURE = 0.5
"""At temperature 0 a retry would return the same grade."""
MIN_GRADE, MAX_GRADE = 0.0, 10.0
Temperature = Annotated[float, Ge(0), Le(2)]
"""Sampling temperature for the writer."""
Role = Literal["writer", "judge"]
"""writer: the model in --engine; judge: the model in --judge-engine, by default the writer."""
Draw = Reply | NoUsableReply


class Requester:
    """Sends an item's requests. Every method may raise `NoReply`.

    The seed is part of a request and follows from item, prompt and draw. After a kill, the item repeats
    the same requests, and `answers.sqlite` holds the answers.

    Args:
        item_id: part of every seed.
        prompts: templates by name.
        clients: role -> client.
        map_draws: maps a function over draw numbers; a run passes a concurrent one.
        judge_max_tokens: longest answer of the judge.
    """

    def __init__(self, item_id: str, prompts: Mapping[str, PromptTemplate],
                 clients: Mapping[Role, Endpoint],
                 map_draws: Callable[[Callable[[int], Draw], Iterable[int]], Iterator[Draw]] = map,
                 judge_max_tokens: int = JUDGE_MAX_TOKENS) -> None:
        self._item_id, self._prompts, self._clients = item_id, prompts, clients
        self._map_draws, self._judge_max_tokens = map_draws, judge_max_tokens
        self.request_keys: dict[str, None] = {}
        """Hashes of used requests, in order."""
        self.writers: dict[str, None] = {}
        """Names of the models behind `request_keys`, without judges."""

    def request_replies(self, prompt: str, fields: Mapping[str, Any], *, count: int = 1, first: int = 0,
                        temperature: float = 0.7, max_tokens: int = 1024, thinking: bool | None = None,
                        attempts: int = MAX_ATTEMPTS) -> list[Reply]:
        """Draw the writer's replies to a prompt, with a seed per draw; unusable draws are omitted.

        Args:
            prompt: prompt name, such as "response".
            fields: values for the template.
            count: number of draws.
            first: number of the first draw, if several calls draw from the same prompt.
            temperature: sampling temperature; 0 is greedy.
            max_tokens: longest reply.
            thinking: whether a reasoning model thinks first; None: the model's default.
            attempts: requests per draw until a reply is usable; 1 for measurements, which count
                unusable replies.

        Raises:
            NoUsableReply: every draw is unusable.
        """
        template = self._prompts[prompt]
        request = _build_request(template.render_messages(fields), temperature, max_tokens, thinking)

        def draw_reply(draw: int) -> Draw:
            try:
                return self._request_usable_reply(request, template.name, draw, attempts)
            except NoUsableReply as e:  # fails this draw only
                return e

        # in draw order: `request_keys` must not depend on thread timing
        draws = list(self._map_draws(draw_reply, range(first, first + count)))
        replies = [draw for draw in draws if isinstance(draw, Reply)]
        if not replies and draws and isinstance(draws[-1], NoUsableReply):
            raise draws[-1]
        for reply in replies:
            self._record_use(reply, "writer")
        return replies

    def request_turn(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
                     draw: int = 0, temperature: float = 0.7, max_tokens: int = 1024,
                     thinking: bool | None = None) -> Reply:
        """Return the writer's next message in a conversation; `draw` distinguishes equal requests."""
        request = _build_request(messages, temperature, max_tokens, thinking)
        if tools:
            request["tools"] = [dict(tool) for tool in tools]
        reply = self._request_usable_reply(request, "", draw, MAX_ATTEMPTS)
        self._record_use(reply, "writer")
        return reply

    def request_grade(self, rubric: str, material: Mapping[str, str]) -> float:
        """Return the judge's grade, 0 to 10, for `material`, which stands between fences in the prompt.

        An answer without a valid grade is retried and never counts as 0. Raises `NoUsableReply`: no answer
        has a valid grade.
        """
        material = {name: replace_surrogates(text) for name, text in material.items()}
        messages = build_fenced_messages(self._clients["judge"].model, replace_surrogates(rubric), material,
                                         MIN_GRADE, MAX_GRADE)
        num_cut = 0
        for attempt in range(MAX_ATTEMPTS):
            temperature = JUDGE_RETRY_TEMPERATURE if attempt else 0.0
            request = _build_request(messages, temperature, self._judge_max_tokens, None)
            reply = self._request_reply("judge", request, "", 0, attempt)
            if reply.is_cut:
                num_cut += 1
                continue
            try:
                grade, _ = parse_grade(reply.text, MIN_GRADE, MAX_GRADE)
            except BadAnswer:
                continue
            self._record_use(reply, "judge")
            return grade
        advice = ""
        if num_cut:
            advice = (f", {num_cut} of them cut off at {self._judge_max_tokens:,} tokens; raise "
                      "--judge-max-tokens, or use a judge that does not think first")
        raise NoUsableReply(f"the judge gave no score in {MAX_ATTEMPTS} answers{advice}")

    def _record_use(self, reply: Reply, role: Role) -> None:
        self.request_keys[reply.key] = None
        if role == "writer":
            self.writers[reply.model or self._clients[role].model] = None

    def _request_usable_reply(self, request: Mapping[str, Any], prompt: str, draw: int, attempts: int
                              ) -> Reply:
        fault = ""
        for attempt in range(attempts):
            # the attempt is part of the seed: the cache would return the same answer to the same request
            reply = self._request_reply("writer", request, prompt, draw, attempt)
            fault = find_reply_fault(reply)
            if not fault:
                return reply
        raise NoUsableReply(f"{attempts} answers were of no use, the last: {fault}")

    def _request_reply(self, role: Role, request: Mapping[str, Any], prompt: str, draw: int, attempt: int
                       ) -> Reply:
        client = self._clients[role]
        # the seed enters the cache key: a draw is the same request in every run
        seed = _compute_seed(self._item_id, prompt, draw, attempt)
        payload = {"model": client.model, **request, "seed": seed}
        key = client.key(payload)
        try:
            return client.ask(payload, lambda answer: read_reply(answer, key, request.get("tools", ())))
        except RequestRefused as e:
            raise NoUsableReply(str(e)) from None
        except EndpointUnavailable:  # fails the whole run
            raise
        except (BadAnswer, TimeoutError) as e:
            raise NoReply(str(e)) from None


def _build_request(messages: Sequence[Mapping[str, Any]], temperature: float, max_tokens: int,
                   thinking: bool | None) -> dict[str, Any]:
    """Build a request body without model and seed."""
    request: dict[str, Any] = {"messages": _replace_half_characters(messages), "temperature": temperature,
                               "top_p": 1.0, "max_tokens": max_tokens}
    if thinking is not None:  # the field of vLLM and `megatron-sov serve`
        request["chat_template_kwargs"] = {"enable_thinking": thinking}
    return request


def _replace_half_characters(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Replace each unpaired surrogate by a question mark, because UTF-8 cannot encode surrogates."""
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    encodable: list[dict[str, Any]] = json.loads(replace_surrogates(text))
    return encodable


def _compute_seed(*parts: object) -> int:
    """Return a seed from 0 to 2**31 - 1 that depends on `parts` only."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    # without the sign bit, to fit a signed 32-bit number
    return int.from_bytes(digest[:4], "big") >> 1
