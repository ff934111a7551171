"""Conversations with tools that reach their goal: a model acts in an environment, in answer to a whole
question (task-oriented) or to a user that another draw of a model plays (user-oriented).

Kept is what ends in the state that the task wants and says what it must; that is worked out by the
environment, and no text of the conversation has a say in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.drawing import Draws
from data_prep.synth.generators.tools.conversation import (
    ConversationTable, Manner, Message, Played, play, scored)
from data_prep.synth.generators.tools.replies import items_of
from data_prep.synth.replies import NoReply, NoUsableReply
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, NotBlank, NotNegativeInt, Share
from megatron_sov.chat.marks import BEGIN_CALL
from megatron_sov.judge.tools.environment import LIMITS
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import make, order

DONE = "###DONE###"
"""What ends a conversation, as tau-bench's users (arXiv 2406.12045) have a word for it."""
STYLES = (
    "You tell what you want piece by piece: first the matter alone, each detail when you are asked for it.",
    "You begin with something slightly different, and change your mind before it is done: you then say what "
    "you really want.",
    "You ask back once before you agree: what it costs, whether there is a choice, or what happens then.",
    "You are short of words and a little impatient, but you answer what you are asked.",
)
"""How users speak; a conversation has one of them."""
MAX_CHARS = 2000
"""Of a user's turn."""
SMALL = 10
"""Whole numbers up to this count things; nobody needs to have said them."""
MAX_NUMBERS = 400
"""Numbers whose sums, differences and products are looked at."""
_NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CODE = re.compile(r"(?<![A-Za-z0-9_])[A-Za-z][A-Za-z_]*-?\d+(?![A-Za-z0-9_])")
USER_SHARE = 177_375 / (161_608 + 177_375)
"""Share of user-oriented conversations among the tool data of Solar Open's report."""


RUBRIC = ("The material is a conversation of an assistant that works with tools. Is everything true that the "
          "assistant says about what it has done and found, by the results of its calls alone? Lower the "
          "score for each claim that no result bears out, and for anything done that nobody asked for.")


class SimulatedUser:
    """One user of one conversation."""

    def __init__(self, ask: Ask, need: str, style: str, draw: int, language: str) -> None:
        """Args:
            ask: the door to models.
            need: what the user wants, whole.
            style: one of `STYLES`.
            draw: number of the conversation among those of its item.
            language: that the user speaks.
        """
        self._ask, self._need, self._style, self._draw, self._language = ask, need, style, draw, language
        self.problems: list[str] = []
        """Turns in which the model fell out of its role."""

    def opening(self) -> str:
        return self._said([]) or self._need

    def answer(self, messages: Sequence[Message]) -> str | None:
        """Return what the user says to a conversation so far; None: nothing more."""
        return self._said(messages)

    def _said(self, messages: Sequence[Message]) -> str | None:
        heard: list[dict[str, Any]] = [
            {"who": "You" if message["role"] == "user" else "Assistant", "said": message["content"]}
            for message in messages
            if message["role"] in ("user", "assistant") and message["content"].strip()]
        reply, = self._ask("tool-trajectories/user", first=self._draw, need=self._need, style=self._style,
                           language=self._language, heard=heard, done=DONE, temperature=0.9, max_tokens=512)
        # faults of the user are noted and the conversation goes on; a check refuses it at the end
        text = reply.text.strip()
        if reply.is_cut or len(text) > MAX_CHARS:
            self.problems.append("a user's turn is too long")
        if BEGIN_CALL in text or text.startswith(("{", "[")):
            self.problems.append("a user writes a tool call, or JSON")
        said = text.partition(DONE)[0].strip()
        return None if DONE in text or not said else said


# Whether what a model says rests on what it was told: its numbers and its codes stand in a turn of the
# user, in a result or in the rules, or come of two such numbers. This sees an id that nobody gave and a
# price that nobody named. It does not see a wrong word; the end state and a judge are for that.


def unfounded(said: Iterable[str], told: Iterable[str]) -> list[str]:
    """Return the numbers and codes that rest on nothing.

    Args:
        said: by the model.
        told: to the model.
    """
    heard, spoken = "\n".join(told), "\n".join(said)
    codes = {code.casefold() for code in _CODE.findall(heard)}
    found = [code for code in dict.fromkeys(_CODE.findall(spoken)) if code.casefold() not in codes]
    known = _numbers(heard)
    open_ = [number for number in _numbers(_CODE.sub(" ", spoken))
             if number not in known and not (number <= SMALL and number.is_integer())]
    # pairs of all numbers are costly: only where one is not found as it is
    made = _made_of(known) if open_ else set()
    return [*found, *(f"{number:g}" for number in open_ if round(number, 4) not in made)]


def _numbers(text: str) -> dict[float, None]:
    return dict.fromkeys(float(number) for number in _NUMBER.findall(_THOUSANDS.sub("", text))
                         if len(number) < 16)


def _made_of(known: Iterable[float]) -> set[float]:
    few = list(known)[:MAX_NUMBERS]
    return {round(value, 4) for i, a in enumerate(few) for b in few[i:]
            for value in (a + b, abs(a - b), a * b)}


@dataclass(frozen=True)
class ToolTrajectorySettings:
    """How conversations are held, and which are kept."""

    environment: str = "virtual"
    """That the tasks are for: a built-in one, or FILE.py:NAME."""
    conversations_per_task: AtLeastOne = 2
    """Each with draws of its own; all that pass are kept, as a group."""
    user_share: Share = USER_SHARE
    """Of conversations in which a model plays the user; 0: all are task-oriented."""
    language: NotBlank = "English"
    """That a played user speaks."""
    max_turns: AtLeastOne = 12
    """Of the model."""
    max_wrong_calls: NotNegativeInt = 1
    """Calls of unknown tools or with wrong arguments; their turns are shown and not learned."""
    min_judged: Grade = 0.0
    """Least score of the judge for true claims, 0 to 10; 0: it is not asked."""
    temperature: Temperature = 0.7
    """Of the model that acts."""
    max_tokens: AtLeastOne = 2048
    """Of a turn."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first; None: as it does by itself."""


class ToolTrajectories(Generator):
    """Makes conversations of tasks."""

    name: ClassVar[str] = "tool-trajectories"
    kind: Kind = "chat"
    help: ClassVar[str] = "conversations with tools that reach the goals of tasks"
    Settings: ClassVar[type[Any]] = ToolTrajectorySettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the tasks of files in JSON lines, or of the output of `goals`, each tried once."""
        environment, _ = make(order(self.settings.environment, {}))
        for item in items_of(inputs, "question", "a task of the environment "
                             f"{self.settings.environment}, as goals makes them"):
            try:
                environment.reset(item.fields)
            except UserError as e:
                raise UserError(f"--input: {item.id}: {e}") from None
            yield item

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        s, task = self.settings, item.fields
        limits = replace(LIMITS["test"], max_turns=s.max_turns)
        manner = Manner(limits, s.temperature, s.max_tokens, s.thinking)
        with EnvironmentHost(order(s.environment, {}), limits) as host:
            for number in range(s.conversations_per_task):
                draws = Draws(item.id, number)
                user: SimulatedUser | None = None
                if draws.share() < s.user_share:
                    user = SimulatedUser(ask, str(task["question"]), draws.one(STYLES), number, s.language)
                played = self._played(task, ConversationTable(ask, host, manner, number), user)
                verdicts = self._checked(played, user)
                if s.min_judged and all(verdict.passed for verdict in verdicts):
                    verdicts.append(_judged(played, ask, s.min_judged))
                yield _sample(item, played, verdicts, "user" if user else "task")

    def _played(self, task: Mapping[str, Any], table: ConversationTable,
                user: SimulatedUser | None) -> Played:
        """Return a conversation with the environment's reward, where it came to an answer."""
        try:
            opening = None if user is None else user.opening()
        except NoUsableReply as e:
            return Played([{"role": "user", "content": str(task["question"])}], [], "unusable", f"user: {e}")
        try:
            played = (play(task, table) if user is None or opening is None
                      else play(task, table, opening, user.answer))
            if played.end == "answered" and played.answers:
                # a user hears every turn; who asks once reads the last one
                scored(played, table.host, "\n".join(played.answers) if user else played.answers[-1])
        except UserError as e:  # `items` has tried the task: the machine has changed since
            raise NoReply(f"the task is refused ({e})") from None
        return played

    def _checked(self, played: Played, user: SimulatedUser | None) -> list[SampleVerdict]:
        """Return the verdicts on a conversation, without the judge's."""
        s, result = self.settings, played.result
        made = f"{played.num_malformed} asked again, {played.num_wrong_calls} wrong"
        told = [message["content"] for message in played.messages if message["role"] != "assistant"]
        verdicts = [
            SampleVerdict("calls can be read", played.end != "malformed", played.detail),
            SampleVerdict("no loop", played.end != "loop"),
            SampleVerdict("came to an end", played.end == "answered",
                          f"{played.end} {played.detail}".strip()),
            SampleVerdict("calls of known tools", played.num_wrong_calls <= s.max_wrong_calls, made),
            SampleVerdict("end state", result is not None and result.reward == 1,
                          "" if result is None else str(dict(result.components)))]
        rests_on_nothing = unfounded(played.answers, told)
        verdicts.append(SampleVerdict("nothing made up", not rests_on_nothing,
                                      ", ".join(rests_on_nothing)[:200]))
        if user is not None:
            verdicts.append(SampleVerdict("user keeps its role", not user.problems, "; ".join(user.problems)))
        return verdicts


def _judged(played: Played, ask: Ask, least: float) -> SampleVerdict:
    """Return the judge's word; one that gives no grade costs this conversation, and not the item's others."""
    try:
        score = ask.judge(RUBRIC, {"conversation": _transcript(played)})
    except NoUsableReply as e:
        return SampleVerdict("judge", False, str(e))
    return SampleVerdict("judge", score >= least, f"{score:g}")


def _sample(item: GeneratorItem, played: Played, verdicts: Sequence[SampleVerdict],
            orientation: str) -> GeneratedSample:
    record: dict[str, Any] = {"messages": played.messages, "tools": played.tools, "orientation": orientation}
    if domain := item.fields.get("domain"):
        record["domain"] = domain
    notes = {"end": played.end, "reward": None if played.result is None else played.result.reward,
             "turns": len([1 for message in played.messages if message["role"] == "assistant"]),
             "faults": dict(played.faults), "malformed": played.num_malformed}
    return GeneratedSample(record, tuple(verdicts), item.id, notes)


def _transcript(played: Played) -> str:
    """Return a conversation as a judge reads it: a line of JSON for each message, so that no text can pass
    for another's message."""
    lines = []
    for message in played.messages:
        said = {"role": message["role"], "content": message["content"]}
        if "tool_calls" in message:
            said["calls"] = [call["function"] for call in message["tool_calls"]]
        lines.append(json.dumps(said, ensure_ascii=False))
    return "\n".join(lines)
