"""Play an episode: model and environment alternate, with exact token accounting.

Token ids are appended and never re-encoded: sampled tokens are trained on exactly as sampled; tokens from
tools and the template are not trained on. Each turn is journaled before the next round.
"""

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
"""Ways an episode ends: answered (or ended by a conversing environment); limit for turns or tokens; a turn
without an end; a broken machine."""


@dataclass(frozen=True)
class GeneratedTurn:
    """A model turn."""

    ids: list[int]
    """Token ids, including the end token if generated."""
    logprobs: list[float] | None = None
    """Log-probability per token, if available."""
    versions: list[int] | None = None
    """Weights version per token; None: a single policy."""
    routes: "np.ndarray | None" = field(default=None, compare=False, repr=False)
    """Expert routes for all tokens so far; None: not requested."""

    @property
    def record(self) -> dict[str, Any]:
        """The journal record, without routes, which the episode holds."""
        return {"ids": self.ids, "logprobs": self.logprobs, "versions": self.versions}


@dataclass(frozen=True)
class EpisodeTurn:
    """A model turn with its calls and results."""

    written: GeneratedTurn
    """The generated tokens."""
    text: str
    """Text of the turn."""
    calls: list[dict[str, Any]]
    """Records with name, arguments, text, fault and is_cut."""
    behind: list[int]
    """Token ids for the results and the next turn's opening; [] at the end."""
    state: str
    """Environment state (`snapshot`) as JSON."""
    end: str = ""
    """A value from `ENDS` for the last turn, else ""."""
    opened: str = ""
    """Thinking mark opened by the template."""
    form: CallForm | None = None
    """Call format in the template; None: unspecified."""
    reply: str | None = None
    """The environment's user message, if any."""

    def parse_text(self) -> WrittenTurn:
        """Parse text and calls."""
        return parse_turn(self.standalone_text, form=self.form)

    def to_served_turn(self, tools: Sequence[dict[str, Any]]) -> ServedTurn:
        """Convert to a server's reply; malformed calls become text."""
        return parse_served_turn(self.standalone_text, False, tools, self.form)

    @property
    def standalone_text(self) -> str:
        """Text including the opened thinking mark."""
        return prepend_mark(self.text, self.opened)


@dataclass
class Episode:
    """An episode in progress or finished."""

    number: int
    """Index in the task list."""
    task: Task
    """The task."""
    opening: Opening
    """First messages and tools."""
    prompt: list[int]
    """Prompt token ids."""
    turns: list[EpisodeTurn] = field(default_factory=list)
    """Turns in order."""
    result: Result | None = None
    """Result of a finished episode."""
    begun: GeneratedTurn | None = None
    """Partial turn, interrupted by a deadline."""
    routes: "np.ndarray | None" = field(default=None, compare=False, repr=False)
    """Expert routes so far; None: not requested."""

    @property
    def end(self) -> str:
        """A value from `ENDS`, or "" while the episode continues."""
        # An episode that could not be resumed has a result but no end.
        last_end = self.turns[-1].end if self.turns else ""
        return last_end or ("infrastructure" if self.result is not None else "")

    @property
    def written(self) -> list[GeneratedTurn]:
        """The model's turns, including a partial turn."""
        return [*(turn.written for turn in self.turns), *([self.begun] if self.begun else [])]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *(i for t in self.turns for i in (*t.written.ids, *t.behind)),
                *(self.begun.ids if self.begun else ())]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Half-open intervals in `ids` written by the model."""
        spans, place = [], len(self.prompt)
        for turn in self.turns:
            spans.append((place, place + len(turn.written.ids)))
            place += len(turn.written.ids) + len(turn.behind)
        return spans if self.begun is None else [*spans, (place, place + len(self.begun.ids))]

    @property
    def num_response_tokens(self) -> int:
        """Tokens after the prompt."""
        return sum(len(t.written.ids) + len(t.behind) for t in self.turns)

    @property
    def answer(self) -> str:
        """The final answer; "" for unfinished episodes."""
        return self.turns[-1].parse_text().content if self.end == "answered" else ""

    def extend_turn(self, more: GeneratedTurn) -> GeneratedTurn:
        """Extend the partial turn by newly generated tokens; routes move to the episode."""
        if more.routes is not None or self.routes is not None:
            # Imports numpy; `--help` must be fast.
            from megatron_sov.base.documents.shard_files import merge_routes

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
    """Encode the first prompt of an episode.

    Raises:
        UserError: the template rejects the conversation, or the prompt is too long.
    """
    observation = opening.observation
    # Many templates treat an empty system message differently from none.
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
    """Run the calls in a model turn; return the turn with results. The episode is not changed.

    Args:
        episode: current episode.
        written: generated tokens within the remaining limit.
        host: the episode's environment, whose state changes.
        encoder: the model's encoder.
        limits: episode limits.
    """
    turn = EpisodeTurn(written, encoder.text(written.ids), [], [], host.state,
                       opened=encoder.opened_thoughts(episode.ids), form=encoder.call_form)
    remaining = limits.max_response_tokens - episode.num_response_tokens - len(written.ids)
    # A truncated turn may hold half a call, so no call runs.
    if not written.ids or written.ids[-1] not in encoder.end_ids:
        return replace(turn, end="unended")
    # Calls run even if no turn can follow, because their effect is scored.
    turn = run_calls(turn, episode, host, limits)
    if turn.end:
        return turn
    following = encoder.encode_after_turn([call["text"] for call in turn.calls],
                                          [call["name"] for call in turn.calls],
                                          turn.reply)
    # At least one token must remain for the model.
    if len(following) >= remaining:
        return replace(turn, end="tokens")
    return replace(turn, behind=following)


def run_calls(turn: EpisodeTurn, episode: Episode, host: EnvironmentHost,
              limits: EpisodeLimits) -> EpisodeTurn:
    """Run the calls in a completed turn; return the turn with results and end.

    Args:
        turn: turn without calls.
        episode: current episode.
        host: the episode's environment, whose state changes.
        limits: episode limits.
    """
    if host.converses:
        return _run_reply(turn, episode, host, limits)
    parsed_calls = turn.parse_text().calls
    # A turn without calls is the answer.
    if not parsed_calls:
        return replace(turn, end="answered")
    # In order, because calls may depend on earlier ones.
    outcomes = [_run_call(call, place, host, limits) for place, call in enumerate(parsed_calls)]
    calls = [{**call_record, "text": result.text, "fault": result.fault, "is_cut": result.is_cut}
             for call_record, result in outcomes]
    turn = replace(turn, calls=calls, state=host.state)
    if any(result.fault == INFRASTRUCTURE for _, result in outcomes):
        return replace(turn, end="infrastructure")
    return replace(turn, end="turns") if len(episode.turns) + 1 >= limits.max_turns else turn


def _run_reply(turn: EpisodeTurn, episode: Episode, host: EnvironmentHost,
               limits: EpisodeLimits) -> EpisodeTurn:
    """Send a whole turn to a conversing environment; like `run_calls`."""
    served = turn.to_served_turn(episode.opening.tools)
    try:
        heard = host.reply(served)
    except InfrastructureFault as e:
        text, is_cut = cut_text(f"error: {e.reason}", limits.max_tool_chars)
        lost = {"name": "", "arguments": {}, "text": text, "fault": e.code, "is_cut": is_cut}
        return replace(turn, calls=[lost], end="infrastructure")
    # An episode that ends after a call shows no result.
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
    """Return a finished episode as a row with reward, tokens and counts."""
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
        # All turns or none, because gaps would look like zeros.
        "logprobs": logprobs if all(part is not None for part in logprobs) else None,
    }


def count_remaining_tokens(episode: Episode, limits: EpisodeLimits) -> int:
    """Return the token limit for the next turn, or for the rest of a partial turn."""
    turn = min(limits.max_response_tokens - episode.num_response_tokens, limits.max_turn_tokens)
    return turn - (len(episode.begun.ids) if episode.begun else 0)


def truncate_turn(written: GeneratedTurn, most: int) -> GeneratedTurn:
    """Truncate a turn to its limit; engines use a common limit for several episodes."""
    logprobs = written.logprobs
    return replace(written, ids=written.ids[:most], logprobs=None if logprobs is None else logprobs[:most])


class EpisodeLines:
    """Journal records: earlier ones, and a function to add more."""

    def __init__(self, lines: Iterable[dict[str, Any]],
                 keep: Callable[[Sequence[dict[str, Any]]], object] = lambda lines: None) -> None:
        """Set the records, and `keep`, which is called with the records of each round."""
        self._lines, self.add = lines, keep

    def read_episodes(self, tasks: Sequence[Task] | Mapping[int, Task]) -> dict[int, Episode]:
        """Return index -> episode, as far as recorded."""
        episodes: dict[int, Episode] = {}
        for line in self._lines:
            number = line["episode"]
            # Records are in journal order: opening, turns, result.
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
    """Return the records for continuing an episode in another process."""
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
