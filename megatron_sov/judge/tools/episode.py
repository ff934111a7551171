"""One episode: a model and an environment in turns, with every token told apart.

Ids are appended and never encoded again: what a model sampled is trained on as it was sampled, and what tools
and the template say is not.

What has been played is kept as lines, one for each turn, before the next round begins.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.marks import CallForm, prepend_mark
from megatron_sov.chat.tool_calls import (
    BadCall, ServedTurn, ToolCall, WrittenTurn, parse_served_turn, parse_turn)
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.tools.environment import (
    INFRASTRUCTURE, EpisodeLimits, InfrastructureFault, Observation, Task, cut_text)
from megatron_sov.judge.tools.host import CallResult, EnvironmentHost, Opening
from megatron_sov.work.progress.journal import Journal

if TYPE_CHECKING:
    import numpy as np

ENDS = ("answered", "turns", "tokens", "unended", "infrastructure")
"""How an episode ends: with an answer, or where an environment that converses ends it; at the limit of turns
or of tokens; in a turn that the model did not end within the limit of tokens; by the fault of what tools run
on."""


@dataclass(frozen=True)
class GeneratedTurn:
    """What a model wrote in one turn."""

    ids: list[int]
    """With the token that ends the turn, where it came."""
    logprobs: list[float] | None = None
    """Of each, where the engine tells them."""
    versions: list[int] | None = None
    """Of the weights that wrote each; None: one policy wrote all."""
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Of all that was read for it, from the beginning of the conversation; None: not asked for."""

    @property
    def record(self) -> dict[str, Any]:
        """Return what is kept of it: routes are the episode's."""
        return {"ids": self.ids, "logprobs": self.logprobs, "versions": self.versions}


@dataclass(frozen=True)
class EpisodeTurn:
    """A model's turn and what came of it."""

    written: GeneratedTurn
    """By the model."""
    text: str
    """Of it."""
    calls: list[dict[str, Any]]
    """Of each call: name, arguments, text, fault, is_cut."""
    behind: list[int]
    """Ids of the results and the opening of the next turn; none where the episode ended."""
    state: str
    """Of the environment, as JSON."""
    end: str = ""
    """One of `ENDS`, where it was the last turn."""
    opened: str = ""
    """Mark of the thoughts that the template had opened before it."""
    form: CallForm | None = None
    """In which the template has the model call tools; None: it does not say."""
    reply: str | None = None
    """What a user of the environment says behind it; None: nothing."""

    def parse_text(self) -> WrittenTurn:
        """Return what it says and calls."""
        return parse_turn(self.standalone_text, form=self.form)

    def to_served_turn(self, tools: Sequence[dict[str, Any]]) -> ServedTurn:
        """Return it as a server would give it to a client; raises nothing: a malformed call is text."""
        return parse_served_turn(self.standalone_text, False, tools, self.form)

    @property
    def standalone_text(self) -> str:
        """Return it as a text that stands by itself."""
        return prepend_mark(self.text, self.opened)


@dataclass
class Episode:
    """An episode as far as it has come."""

    number: int
    """Place in the list of tasks."""
    task: Task
    """What is to be done."""
    opening: Opening
    """What the model was told."""
    prompt: list[int]
    """Its ids."""
    turns: list[EpisodeTurn] = field(default_factory=list)
    """In order."""
    result: Result | None = None
    """The reward, behind the end."""
    begun: GeneratedTurn | None = None
    """What a deadline has left of a turn, with which it goes on."""
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Of all that was read so far; None: not asked for."""

    @property
    def end(self) -> str:
        """Return how it ended; empty: it goes on."""
        # one that could not be continued has a result, and its last turn no end
        last_end = self.turns[-1].end if self.turns else ""
        return last_end or ("infrastructure" if self.result is not None else "")

    @property
    def written(self) -> list[GeneratedTurn]:
        """Return what the model wrote, turn by turn, an unfinished one too."""
        return [*(turn.written for turn in self.turns), *([self.begun] if self.begun else [])]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *(i for t in self.turns for i in (*t.written.ids, *t.behind)),
                *(self.begun.ids if self.begun else ())]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return the places that the model wrote, as half-open intervals of `ids`."""
        spans, place = [], len(self.prompt)
        for turn in self.turns:
            spans.append((place, place + len(turn.written.ids)))
            place += len(turn.written.ids) + len(turn.behind)
        return spans if self.begun is None else [*spans, (place, place + len(self.begun.ids))]

    @property
    def num_response_tokens(self) -> int:
        """Return the tokens behind the prompt."""
        return sum(len(t.written.ids) + len(t.behind) for t in self.turns)

    @property
    def answer(self) -> str:
        """Return what the model said in the end; empty where it did not come to one."""
        return self.turns[-1].parse_text().content if self.end == "answered" else ""

    def extend_turn(self, more: GeneratedTurn) -> GeneratedTurn:
        """Return a turn up to here: what had been begun of it, and more; its routes become the episode's."""
        if more.routes is not None or self.routes is not None:
            from megatron_sov.base.documents.shard_files import merge_routes  # numpy, which no help needs

            self.routes = merge_routes(self.routes, more.routes, len(self.ids) + len(more.ids) - 1)
        before, self.begun = self.begun, None
        if before is None:
            return replace(more, routes=None)
        return GeneratedTurn([*before.ids, *more.ids], _join_lists(before.logprobs, more.logprobs),
                             _join_lists(before.versions, more.versions))

    def count_faults(self) -> Counter[str]:
        return Counter(call["fault"] for turn in self.turns for call in turn.calls if call["fault"])


def _join_lists(before: list[Any] | None, more: list[Any] | None) -> list[Any] | None:
    return None if before is None or more is None else [*before, *more]


def begin_episode(number: int, task: Task, opening: Opening, encoder: TurnEncoder,
                  limits: EpisodeLimits) -> Episode:
    """Return an episode that has just begun.

    Raises:
        UserError: the model's template refuses the question or the tools, or they are too long.
    """
    observation = opening.observation
    # an empty system message is not the same as none to many templates
    messages = [Message("system", observation.system)] if observation.system else []
    chat = Conversation((*messages, Message("user", observation.user)), opening.tools)
    try:
        prompt = encoder.opening(chat)
    except BadRecord as e:
        raise UserError(f"its conversation {e.reason}") from None
    if len(prompt) > limits.max_prompt_tokens:
        raise UserError(f"its question and tools make {len(prompt):,} tokens, more than max_prompt_tokens "
                        f"{limits.max_prompt_tokens:,}; raise it with --limit, or shorten them")
    return Episode(number, task, opening, prompt)


def take_turn(episode: Episode, written: GeneratedTurn, host: EnvironmentHost, encoder: TurnEncoder,
              limits: EpisodeLimits) -> EpisodeTurn:
    """Return the next turn of an episode: what the model wrote, its calls and their results.

    Args:
        episode: which; it is left as it is.
        written: within what is left of the limit of tokens.
        host: of the episode's environment, whose state changes.
        encoder: of the model.
        limits: of the episode.
    """
    turn = EpisodeTurn(written, encoder.text(written.ids), [], [], host.state,
                       opened=encoder.opened_thoughts(episode.ids), form=encoder.call_form)
    remaining = limits.max_response_tokens - episode.num_response_tokens - len(written.ids)
    # a turn that was cut may hold half a call: none of it is made
    if not written.ids or written.ids[-1] not in encoder.end_ids:
        return replace(turn, end="unended")
    # calls are made even where no turn can follow: their effect is what is scored
    turn = run_calls(turn, episode, host, limits)
    if turn.end:
        return turn
    following = encoder.encode_after_turn([call["text"] for call in turn.calls],
                                       [call["name"] for call in turn.calls],
                                       turn.reply)
    # a token at least has to be left for the model
    if len(following) >= remaining:
        return replace(turn, end="tokens")
    return replace(turn, behind=following)


def run_calls(turn: EpisodeTurn, episode: Episode, host: EnvironmentHost,
               limits: EpisodeLimits) -> EpisodeTurn:
    """Return a turn that the model has ended with the results of its calls, and its end where it has come.

    Args:
        turn: without calls.
        episode: whose next turn it is.
        host: of the episode's environment, whose state changes.
        limits: of the episode.
    """
    if host.converses:
        return _run_reply(turn, episode, host, limits)
    parsed_calls = turn.parse_text().calls
    # no call is an answer, which ends the episode
    if not parsed_calls:
        return replace(turn, end="answered")
    # in order, one after the other: a call may depend on what the one before has changed
    outcomes = [_run_call(call, place, host, limits) for place, call in enumerate(parsed_calls)]
    calls = [{**call_record, "text": result.text, "fault": result.fault, "is_cut": result.is_cut}
             for call_record, result in outcomes]
    turn = replace(turn, calls=calls, state=host.state)
    if any(result.fault == INFRASTRUCTURE for _, result in outcomes):
        return replace(turn, end="infrastructure")
    return replace(turn, end="turns") if len(episode.turns) + 1 >= limits.max_turns else turn


def _run_reply(turn: EpisodeTurn, episode: Episode, host: EnvironmentHost,
                limits: EpisodeLimits) -> EpisodeTurn:
    """Return a turn with what an environment that is told all of it says behind it; as `with_calls`."""
    served = turn.to_served_turn(episode.opening.tools)
    try:
        heard = host.reply(served)
    except InfrastructureFault as e:
        text, is_cut = cut_text(f"error: {e.reason}", limits.max_tool_chars)
        lost = {"name": "", "arguments": {}, "text": text, "fault": e.code, "is_cut": is_cut}
        return replace(turn, calls=[lost], end="infrastructure")
    # an episode that is over behind a call shows no result of it
    results = heard.results or (CallResult(""),) * len(served.calls)
    calls = [{**asdict(call), "text": result.text, "fault": result.fault, "is_cut": result.is_cut}
             for call, result in zip(served.calls, results, strict=True)]
    turn = replace(turn, calls=calls, reply=heard.user, state=host.state)
    if heard.is_over:
        return replace(turn, end="answered")
    return replace(turn, end="turns") if len(episode.turns) + 1 >= limits.max_turns else turn


def _run_call(call: ToolCall | BadCall, place: int, host: EnvironmentHost,
          limits: EpisodeLimits) -> tuple[dict[str, Any], CallResult]:
    if isinstance(call, BadCall):
        return {"name": "", "arguments": {}}, _build_fault(call.code, call.reason, limits)
    call_record = {"name": call.name, "arguments": call.arguments}
    if place >= limits.max_calls_per_turn:
        reason = f"a turn may have {limits.max_calls_per_turn} calls; this one was not made"
        return call_record, _build_fault("many", reason, limits)
    return call_record, host.call(call)


def _build_fault(code: str, reason: str, limits: EpisodeLimits) -> CallResult:
    text, is_cut = cut_text(f"error: {reason}", limits.max_tool_chars)
    return CallResult(text, code, is_cut)


def build_row(episode: Episode, encoder: TurnEncoder) -> dict[str, Any]:
    """Return an ended episode as a row: its reward, its tokens, and what was counted."""
    assert episode.result is not None, "the episode has not been scored"
    written = episode.written
    logprobs = [w.logprobs for w in written]
    return {
        "episode": episode.number, "task": dict(episode.task), "end": episode.end,
        "reward": episode.result.reward, "status": episode.result.status,
        "components": dict(episode.result.components), "reason": episode.result.reason,
        "answer": episode.answer, "num_turns": len(episode.turns),
        "num_calls": sum(len(turn.calls) for turn in episode.turns), "faults": dict(episode.count_faults()),
        "num_cut": sum(call["is_cut"] for turn in episode.turns for call in turn.calls),
        "num_turns_that_differ": sum(encoder.differs(w.ids) for w in written),
        "ids": episode.ids, "spans": [list(span) for span in episode.spans],
        # of all turns or of none: a gap could not be told from a zero
        "logprobs": logprobs if all(part is not None for part in logprobs) else None,
    }


def count_remaining_tokens(episode: Episode, limits: EpisodeLimits) -> int:
    """Return the tokens that the next turn may have, or the rest of one that is begun."""
    turn = min(limits.max_response_tokens - episode.num_response_tokens, limits.max_turn_tokens)
    return turn - (len(episode.begun.ids) if episode.begun else 0)


def truncate_turn(written: GeneratedTurn, most: int) -> GeneratedTurn:
    """Return what a model wrote up to its limit; engines are asked for several episodes at a time."""
    logprobs = written.logprobs
    return replace(written, ids=written.ids[:most], logprobs=None if logprobs is None else logprobs[:most])


class EpisodeLines:
    """Lines of episodes: those that were kept before, and where more are kept."""

    def __init__(self, lines: Iterable[dict[str, Any]],
                 keep: Callable[[Sequence[dict[str, Any]]], object] = lambda lines: None) -> None:
        """`keep`: is given the lines of each round."""
        self._lines, self.add = lines, keep

    def read_episodes(self, tasks: Sequence[Task] | Mapping[int, Task]) -> dict[int, Episode]:
        """Return number -> the episodes that had begun, as far as they had come."""
        episodes: dict[int, Episode] = {}
        for line in self._lines:
            number = line["episode"]
            # lines come in the order in which they were kept: begin, turns, result
            if "prompt" in line:
                opening = Opening(Observation(**line["observation"]), tuple(line["tools"]))
                episodes[number] = Episode(number, tasks[number], opening, line["prompt"],
                                        routes=line.get("routes"))
            elif "turn" in line:
                turn = line["turn"]
                episodes[number].turns.append(EpisodeTurn(**turn
                                                       | {"written": GeneratedTurn(**turn["written"])}))
            elif "begun" in line:
                episodes[number].begun = GeneratedTurn(**line["begun"])
            else:
                episodes[number].result = Result(**line["result"])
        return episodes


def build_opening_record(episode: Episode) -> dict[str, Any]:
    return {"episode": episode.number, "prompt": episode.prompt,
            "observation": asdict(episode.opening.observation), "tools": list(episode.opening.tools)}


def build_turn_record(episode: Episode, place: int = -1) -> dict[str, Any]:
    turn = episode.turns[place]
    return {"episode": episode.number, "turn": asdict(turn) | {"written": turn.written.record}}


def build_episode_records(episode: Episode) -> list[dict[str, Any]]:
    """Return all lines of an episode that goes on: what another process needs to go on with it."""
    unfinished = [] if episode.begun is None else [{"episode": episode.number, "begun": episode.begun.record}]
    return [build_opening_record(episode),
            *(build_turn_record(episode, n) for n in range(len(episode.turns))), *unfinished]


def build_result_record(episode: Episode) -> dict[str, Any]:
    assert episode.result is not None
    return {"episode": episode.number, "result": asdict(episode.result)}


def open_episode_lines(journal: Journal) -> EpisodeLines:
    def keep(lines: Sequence[dict[str, Any]]) -> None:
        journal.add([(line["episode"], json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                     for line in lines])

    return EpisodeLines((json.loads(record) for _, record in journal.records()), keep)
