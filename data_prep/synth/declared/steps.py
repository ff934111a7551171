"""Steps of a declared generator: each changes a draft of a sample, divides it, or checks it.

The first check that fails ends a draft, so that nothing more is asked about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Len, MinLen

from data_prep.synth.declared.functions import Answer
from data_prep.synth.declared.parsers import PARSERS, Parser
from data_prep.synth.generator import Ask, SampleVerdict
from data_prep.synth.generators.conversation import Player
from data_prep.synth.replies import NoUsableReply
from data_prep.synth.templates import BadTemplate, compile_value, fill, names_in, unknown_names
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import AtLeastOne, NotBlank

EXPRESSIONS = frozenset(("play", "number", "when", "that", "count", "least", "temperature", "max_tokens"))
"""Parts of steps that are no text."""
MAX_KEPT_CHARS = 2000
"""Of a reply that cannot be read, in its rejected sample."""


@dataclass
class Draft:
    """A sample on its way through the steps."""

    fields: dict[str, Any]
    verdicts: list[SampleVerdict] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    unread: str = ""
    """A reply that could not be read."""

    @property
    def has_failed(self) -> bool:
        return any(not verdict.passed for verdict in self.verdicts)

    def split(self, parts: Sequence[Mapping[str, Any]]) -> list[Draft]:
        """Return a draft for each mapping of further fields; `part` is its place."""
        return [Draft({**self.fields, **part, "part": place}, list(self.verdicts), dict(self.notes))
                for place, part in enumerate(parts)]

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        self.verdicts.append(SampleVerdict(name, passed, detail))


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One entry of `steps`."""

    when: bool | str = True
    """Whether it runs: an expression."""
    computed: ClassVar[tuple[str, ...]] = ()
    """Its parts that are values, besides `when`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields that it reads, whatever its values are."""
    divides: ClassVar[bool] = False

    def gives(self) -> list[str]:
        """Return the fields that it sets."""
        return []

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield part and sentence of each mistake, besides those of its values."""
        yield from ()

    @abstractmethod
    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str
            ) -> Sequence[Draft] | None:
        """Change a draft, or return the drafts that it becomes."""


@dataclass(frozen=True, kw_only=True)
class AskStep(Step):
    """Ask the model with a prompt of the file."""

    ask: str
    into: str = "reply"
    """Field for the reply's text; of several replies, a list."""
    count: AtLeastOne | str | None = None
    """Replies to ask for; left out: one, as text."""
    temperature: float | str = "{{ temperature }}"
    max_tokens: int | str = "{{ max_tokens }}"
    attempts: AtLeastOne = 3
    """Replies to one draw before it counts as without use."""
    may_fail: bool = False
    """Whether the steps go on with an empty reply, or list, where no reply is of use; else the item has no
    samples."""
    computed: ClassVar[tuple[str, ...]] = ("count", "temperature", "max_tokens")

    def gives(self) -> list[str]:
        return [self.into]

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if self.ask not in prompts:
            yield "ask", (f"must be one of the file's prompts ({', '.join(prompts)})"
                          f"{suggest_name(self.ask, list(prompts))}")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        try:
            replies = ask(f"{generator}/{self.ask}", draft.fields, count=values["count"] or 1,
                          temperature=values["temperature"], max_tokens=values["max_tokens"],
                          thinking=draft.fields.get("thinking"), attempts=self.attempts)
        except NoUsableReply:
            if not self.may_fail:
                raise
            replies = []
        answers = [Answer.of(reply) for reply in replies]
        draft.fields[self.into] = (*answers, Answer(""))[0] if values["count"] is None else answers


@dataclass(frozen=True, kw_only=True)
class ParseStep(Step):
    """Read `reply`; it must have ended by itself and have the form that was asked for."""

    parse: Annotated[dict[str, Any], Len(1, 1)]
    """Parser -> its argument."""
    name: str = "form"
    """Of the check."""
    needs: ClassVar[tuple[str, ...]] = ("reply",)

    @property
    def parser(self) -> Parser:
        return PARSERS[next(iter(self.parse))]

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return self.parser.gives_several

    def gives(self) -> list[str]:
        return list(self.parser.names(next(iter(self.parse.values()))))

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        name, argument = next(iter(self.parse.items()))
        if name not in PARSERS:
            yield "parse", f"must be one of {', '.join(PARSERS)}{suggest_name(name, list(PARSERS))}"
        elif isinstance(said := PARSERS[name].names(argument), str):
            yield "parse", f"{name}: {said}"

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str
            ) -> Sequence[Draft] | None:
        reply = draft.fields["reply"]
        found = self.parser.read(reply, next(iter(self.parse.values())))
        draft.check("complete", not reply.cut, "cut off at the limit of tokens" if reply.cut else "")
        if found is None or reply.cut:
            draft.check(self.name, found is not None, "does not have the form that was asked for")
            draft.unread = reply[:MAX_KEPT_CHARS]
            return None
        if self.divides:
            return draft.split(found)
        draft.fields.update(found)
        return None


@dataclass(frozen=True, kw_only=True)
class EachStep(Step):
    """Divide a sample: one for each value of a list."""

    each: Annotated[dict[str, Any], Len(1, 1)]
    """Field -> list."""
    computed: ClassVar[tuple[str, ...]] = ("each",)
    divides: ClassVar[bool] = True

    def gives(self) -> list[str]:
        return list(self.each)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> Sequence[Draft]:
        (name, listed), = values["each"].items()
        return draft.split([{name: one} for one in _list(name, listed)])


@dataclass(frozen=True, kw_only=True)
class EveryStep(Step):
    """Run steps for each value of a list, on the same sample."""

    every: Annotated[dict[str, Any], Len(1, 1)]
    """Field -> list."""
    do: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    """Steps; none of them may divide."""
    computed: ClassVar[tuple[str, ...]] = ("every",)

    def gives(self) -> list[str]:
        return list(self.every)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        raise AssertionError("its own steps run in `CompiledStep`")


@dataclass(frozen=True, kw_only=True)
class SetStep(Step):
    """Set fields."""

    set: Annotated[dict[str, Any], MinLen(1)]
    computed: ClassVar[tuple[str, ...]] = ("set",)

    def gives(self) -> list[str]:
        return list(self.set)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        draft.fields.update(values["set"])


@dataclass(frozen=True, kw_only=True)
class NoteStep(Step):
    """Note figures of a sample, which are not for training."""

    note: Annotated[dict[str, Any], MinLen(1)]
    computed: ClassVar[tuple[str, ...]] = ("note",)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        draft.notes.update(values["note"])


@dataclass(frozen=True, kw_only=True)
class JudgeStep(Step):
    """Have the judge grade texts from 0 to 10, by a rubric."""

    judge: NotBlank
    """The rubric."""
    material: Annotated[dict[str, str], MinLen(1)]
    """Name -> text, which the judge is told not to obey."""
    name: str = ""
    """Of the check, after `judge: `."""
    least: float | str = 0.0
    """Grade that passes; with `into` nothing is checked."""
    into: str = ""
    """Field for the grade."""
    computed: ClassVar[tuple[str, ...]] = ("judge", "material", "least")

    def gives(self) -> list[str]:
        return [self.into] if self.into else []

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        if self.into:
            draft.fields[self.into] = ask.judge(values["judge"], values["material"])
            return
        name = f"judge: {self.name}" if self.name else "judge"
        try:
            grade = ask.judge(values["judge"], values["material"])
        except NoUsableReply as e:
            draft.check(name, False, str(e))
            return
        draft.check(name, grade >= values["least"], f"grade {grade:g}, at least {values['least']:g}")


@dataclass(frozen=True, kw_only=True)
class ThatStep(Step):
    """Check that an expression is true, or that a verdict or a list of verdicts passes."""

    that: NotBlank
    name: NotBlank
    """Of the check; verdicts keep their own."""
    detail: str = ""
    """Figures or words for a reader where it fails."""
    computed: ClassVar[tuple[str, ...]] = ("that", "detail")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        found = values["that"]
        verdicts = found if isinstance(found, list) else [found]
        if verdicts and all(isinstance(verdict, SampleVerdict) for verdict in verdicts):
            draft.verdicts += verdicts
        else:
            draft.check(self.name, bool(found), "" if found else str(values["detail"]))


@dataclass(frozen=True, kw_only=True)
class PlayStep(Step):
    """Play a conversation about a task of `virtual`, with the sample's `max_turns`, into `played`."""

    play: str
    """The task: an expression."""
    number: int | str = 0
    """Of the conversation among those of its item, which sets its draws apart."""
    user: str = ""
    """Prompt by which the model plays the user, with `heard`; empty: the user asks the task's question."""
    computed: ClassVar[tuple[str, ...]] = ("play", "number")
    needs: ClassVar[tuple[str, ...]] = ("max_turns", "temperature", "max_tokens")

    def gives(self) -> list[str]:
        return ["played"]

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if self.user and self.user not in prompts:
            yield "user", (f"must be one of the file's prompts ({', '.join(prompts)})"
                           f"{suggest_name(self.user, list(prompts))}")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, generator: str) -> None:
        prompt = f"{generator}/{self.user}" if self.user else ""
        draft.fields["played"] = Player(ask, draft.fields, values["number"], prompt).play(values["play"])


VERBS: Mapping[str, type[Step]] = {
    "ask": AskStep, "parse": ParseStep, "each": EachStep, "every": EveryStep, "set": SetStep,
    "note": NoteStep, "judge": JudgeStep, "play": PlayStep, "that": ThatStep}
"""Key that tells what a step does -> step."""


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} = {str(value)[:60]!r} must be a list; mend the step in the generator's file")
    return value


@dataclass(frozen=True)
class CompiledStep:
    """A step with its values compiled."""

    step: Step
    values: Mapping[str, Any]
    inner: tuple[CompiledStep, ...] = ()
    """Steps of `every`."""

    def run(self, draft: Draft, ask: Ask, generator: str) -> Sequence[Draft] | None:
        """Run the step on a draft; returns the drafts that it becomes, if it is divided."""
        if not fill(self.values["when"], draft.fields):
            return None
        values = {name: fill(value, draft.fields) for name, value in self.values.items() if name != "when"}
        if not isinstance(self.step, EveryStep):
            try:
                return self.step.run(values, draft, ask, generator)
            except (TypeError, ValueError, AttributeError, KeyError) as e:  # a value of another type
                raise UserError(f"{generator}: a step with {', '.join(values)} cannot run "
                                f"({type(e).__name__}: {e}); mend it") from None
        (name, listed), = values["every"].items()
        for one in _list(name, listed):
            draft.fields[name] = one
            for step in self.inner:
                step.run(draft, ask, generator)
                if draft.has_failed:
                    return None
        return None


def compile_step(step: Step, inner: tuple[CompiledStep, ...], known: Sequence[str]
                 ) -> tuple[CompiledStep, list[tuple[str, str]]]:
    """Compile a step whose form is sound; returns part and sentence of each problem as well.

    Args:
        step: the step.
        inner: its own steps.
        known: fields that settings, items and the steps before give.
    """
    values: dict[str, Any] = {}
    problems = [("parse", said) for said in unknown_names(step.needs, known)]
    for part in ("when", *step.computed):
        raw = getattr(step, part)
        try:
            values[part] = compile_value(raw)
        except BadTemplate as e:
            problems.append((part, str(e)))
            continue
        problems += [(part, said) for said in unknown_names(names_in(values[part]), known)]
        if part in EXPRESSIONS and isinstance(raw, str) and not values[part].is_expression:
            problems.append((part, "must be one {{ expression }}, or a value that is no text"))
    return CompiledStep(step, values, inner), problems
