"""The steps of a declared generator: how one item becomes samples.

Steps run from top to bottom.  A step may ask a model, read a reply, set fields, judge, or divide the sample
into several, each of which goes through the steps that follow.  The first check that fails ends a sample:
what follows is not asked and not paid.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from data_prep.synth.declared.functions import CHECKS, Answer, Judging
from data_prep.synth.declared.parsers import PARSERS
from data_prep.synth.declared.values import BadValue, compile_value, fill, unknown_names
from data_prep.synth.generator import Ask, NoUsableReply, SampleVerdict
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import AtLeastOne, NotBlank

MAX_PER_REPLY = 100
"""Samples that one reply may become."""
EXPRESSIONS = frozenset(("when", "that", "of", "count", "most", "least", "temperature", "max_tokens",
                         "thinking"))
"""Parts of steps that are no text."""
MAX_KEPT_CHARS = 2000
"""Of a reply that cannot be read, which stands in its rejected sample."""


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

    def part(self, fields: Mapping[str, Any]) -> Draft:
        """Return one of the samples that this one is divided into."""
        return Draft({**self.fields, **fields}, list(self.verdicts), dict(self.notes))

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        self.verdicts.append(SampleVerdict(name, passed, detail))


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One entry of `steps`."""

    when: bool | str = True
    """Whether it runs: an expression."""
    computed: ClassVar[tuple[str, ...]] = ()
    """Its parts that are values."""
    divides: ClassVar[bool] = False

    def gives(self) -> list[str]:
        """Return the fields that it sets."""
        return []

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield part and sentence of what is wrong with it, besides its values."""
        yield from ()

    @abstractmethod
    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str
            ) -> Sequence[Draft] | None:
        """Change a draft, or return the drafts that it becomes."""


@dataclass(frozen=True, kw_only=True)
class AskStep(Step):
    """Ask a model with a prompt of the file."""

    ask: str
    """Name of the prompt."""
    into: str = "reply"
    """Field for the reply's text; of several replies, a list."""
    count: AtLeastOne | str | None = None
    """Replies to ask for; left out: one, as text."""
    temperature: float | str = "{{ temperature }}"
    top_p: float = 1.0
    max_tokens: int | str = "{{ max_tokens }}"
    thinking: bool | str | None = None
    role: Literal["writer", "judge"] = "writer"
    attempts: AtLeastOne = 3
    """Replies to one draw before it counts as without use."""
    unusable: str = ""
    """Check that fails where no reply is of use; empty: the item has no samples."""
    may_fail: bool = False
    """Whether the steps go on with an empty reply, or list, where no reply is of use."""
    computed: ClassVar[tuple[str, ...]] = ("when", "count", "temperature", "max_tokens", "thinking")

    def gives(self) -> list[str]:
        return [self.into]

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if self.ask not in prompts:
            yield "ask", (f"must be one of the file's prompts ({', '.join(prompts)})"
                          f"{nearest(self.ask, list(prompts))}")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        count = values["count"]
        try:
            replies = ask(f"{prompt_folder}/{self.ask}", draft.fields, count=count or 1, role=self.role,
                          temperature=values["temperature"], top_p=self.top_p,
                          max_tokens=values["max_tokens"], thinking=values["thinking"],
                          attempts=self.attempts)
        except NoUsableReply as e:
            if self.unusable:
                draft.check(self.unusable, False, str(e))
                return
            if not self.may_fail:
                raise
            replies = []
        answers = [Answer.of(reply.text, reply.is_cut, reply.thinking) for reply in replies]
        draft.fields[self.into] = answers if count is not None else (*answers, Answer(""))[0]


@dataclass(frozen=True, kw_only=True)
class ParseStep(Step):
    """Read a reply; it must have ended by itself and have the form that was asked for."""

    parse: Annotated[dict[str, Any], MinLen(1)]
    """Parser -> what it reads: names, or an expression."""
    of: str = "{{ reply }}"
    most: AtLeastOne | str = MAX_PER_REPLY
    """Samples that a reply with several parts may become."""
    name: str = "form"
    """Of the check."""
    computed: ClassVar[tuple[str, ...]] = ("when", "of", "most")

    @property
    def parser(self) -> Any:
        return PARSERS[next(iter(self.parse))]

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return bool(self.parser.gives_several)

    def gives(self) -> list[str]:
        name, argument = next(iter(self.parse.items()))
        return list(PARSERS[name].names(argument)) if name in PARSERS else []

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        name, argument = next(iter(self.parse.items()))
        if len(self.parse) > 1 or name not in PARSERS:
            yield "parse", f"must be one of {', '.join(PARSERS)}{nearest(name, list(PARSERS))}"
        elif said := PARSERS[name].problem(argument):
            yield "parse", f"{name}: {said}"

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str
            ) -> Sequence[Draft] | None:
        reply = values["of"]
        is_cut = bool(getattr(reply, "cut", False))
        found = self.parser.read(reply, next(iter(self.parse.values())))
        draft.check("complete", not is_cut, "cut off at the limit of tokens" if is_cut else "")
        if found is None or is_cut:
            draft.check(self.name, found is not None, "does not have the form that was asked for")
            draft.unread = reply[:MAX_KEPT_CHARS]
            return None
        if self.divides:
            return [draft.part({**one, "part": place}) for place, one in enumerate(found[:values["most"]])]
        draft.fields.update(found)
        return None


@dataclass(frozen=True, kw_only=True)
class EachStep(Step):
    """Divide a sample: one for each value of a list."""

    each: Annotated[dict[str, Any], MinLen(1)]
    """Field -> list."""
    computed: ClassVar[tuple[str, ...]] = ("when", "each")
    divides: ClassVar[bool] = True

    def gives(self) -> list[str]:
        return list(self.each)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> Sequence[Draft]:
        (name, listed), = values["each"].items()
        check_list(name, listed)
        return [draft.part({name: one, "part": place}) for place, one in enumerate(listed)]


@dataclass(frozen=True, kw_only=True)
class EveryStep(Step):
    """Run steps for each value of a list, on the same sample."""

    every: Annotated[dict[str, Any], MinLen(1)]
    """Field -> list."""
    do: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    """Steps; none of them may divide."""
    computed: ClassVar[tuple[str, ...]] = ("when", "every")

    def gives(self) -> list[str]:
        return list(self.every)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        raise AssertionError("its own steps run in `CompiledStep`")


@dataclass(frozen=True, kw_only=True)
class SetStep(Step):
    """Set fields."""

    set: Annotated[dict[str, Any], MinLen(1)]
    computed: ClassVar[tuple[str, ...]] = ("when", "set")

    def gives(self) -> list[str]:
        return list(self.set)

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        draft.fields.update(values["set"])


@dataclass(frozen=True, kw_only=True)
class NoteStep(Step):
    """Note figures of a sample, which are not for training."""

    note: Annotated[dict[str, Any], MinLen(1)]
    computed: ClassVar[tuple[str, ...]] = ("when", "note")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        draft.notes.update(values["note"])


@dataclass(frozen=True, kw_only=True)
class JudgeStep(Step):
    """Have the judge grade texts from 0 to 10, by a rubric."""

    judge: NotBlank
    """The rubric."""
    material: Annotated[dict[str, str], MinLen(1)]
    """Name -> text, which the judge is told not to obey."""
    name: str = "judge"
    """Of the check; after `judge: `."""
    least: float | str = 0.0
    """Grade that passes; with `into` alone nothing is checked."""
    into: str = ""
    """Field for the grade."""
    computed: ClassVar[tuple[str, ...]] = ("when", "judge", "material", "least")

    def gives(self) -> list[str]:
        return [self.into] if self.into else []

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        name = self.name if self.name == "judge" else f"judge: {self.name}"
        try:
            grade = ask.judge(values["judge"], values["material"])
        except NoUsableReply as e:
            if self.into:
                raise
            draft.check(name, False, str(e))
            return
        if self.into:
            draft.fields[self.into] = grade
        else:
            draft.check(name, grade >= values["least"], f"grade {grade:g}, at least {values['least']:g}")


@dataclass(frozen=True, kw_only=True)
class CheckStep(Step):
    """Run a check by its name.  Arguments that are left out are the fields of the same names."""

    check: str
    args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """Of the verdict; empty: that of the check."""
    into: str = ""
    """Field for whether it passed; the sample then goes on either way."""
    computed: ClassVar[tuple[str, ...]] = ("when", "args")

    def gives(self) -> list[str]:
        return [self.into] if self.into else []

    def problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if self.check not in CHECKS:
            yield "check", f"must be one of {', '.join(CHECKS)}{nearest(self.check, list(CHECKS))}"
            return
        known = list(inspect.signature(CHECKS[self.check]).parameters)[1:]
        for name in self.args:
            if name not in known:
                yield f"args.{name}", f"is no argument of {self.check}, which takes {', '.join(known)}"

    def with_fields(self) -> CheckStep:
        """Return this step with the arguments that are taken from fields."""
        parameters = list(inspect.signature(CHECKS[self.check]).parameters.values())[1:]
        taken = {one.name: "{{ " + one.name + " }}" for one in parameters
                 if one.name not in self.args and one.default is inspect.Parameter.empty}
        return replace(self, args={**taken, **self.args})

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        verdicts = list(CHECKS[self.check](Judging(ask, self.name or self.check), **values["args"]))
        if self.into:
            draft.fields[self.into] = all(verdict.passed for verdict in verdicts)
        else:
            draft.verdicts += verdicts


@dataclass(frozen=True, kw_only=True)
class ThatStep(Step):
    """Check that an expression is true."""

    that: NotBlank
    name: NotBlank
    """Of the check."""
    detail: str = ""
    """What a reader is told where it fails."""
    computed: ClassVar[tuple[str, ...]] = ("when", "that", "detail")

    def run(self, values: Mapping[str, Any], draft: Draft, ask: Ask, prompt_folder: str) -> None:
        draft.check(self.name, bool(values["that"]), "" if values["that"] else str(values["detail"]))


VERBS: Mapping[str, type[Step]] = {
    "ask": AskStep, "parse": ParseStep, "each": EachStep, "every": EveryStep, "set": SetStep,
    "note": NoteStep, "judge": JudgeStep, "check": CheckStep, "that": ThatStep}
"""Key that tells what a step does -> step."""


def check_list(name: str, value: Any) -> None:
    """Raise UserError where a value that is gone through is no list."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} = {str(value)[:60]!r} must be a list; mend the step in the generator's file")


@dataclass(frozen=True)
class CompiledStep:
    """A step with its values compiled."""

    step: Step
    values: Mapping[str, Any]
    inner: tuple[CompiledStep, ...] = ()
    """Steps of `every`."""

    def run(self, draft: Draft, ask: Ask, prompt_folder: str) -> Sequence[Draft] | None:
        """Run the step on a draft; returns the drafts that it becomes, if it is divided."""
        if not fill(self.values["when"], draft.fields):
            return None
        values = {name: fill(value, draft.fields) for name, value in self.values.items() if name != "when"}
        if not isinstance(self.step, EveryStep):
            try:
                return self.step.run(values, draft, ask, prompt_folder)
            except (TypeError, ValueError, AttributeError, KeyError) as e:  # a value of another type
                raise UserError(f"{prompt_folder}: a step with {', '.join(values)} cannot run "
                                f"({type(e).__name__}: {e}); mend it") from None
        (name, listed), = values["every"].items()
        check_list(name, listed)
        for one in listed:
            draft.fields[name] = one
            for step in self.inner:
                step.run(draft, ask, prompt_folder)
                if draft.has_failed:
                    return None
        return None


def compile_step(step: Step, inner: tuple[CompiledStep, ...], known: Sequence[str]
                 ) -> tuple[CompiledStep | None, list[tuple[str, str]]]:
    """Compile a step whose names are sound; returns part and sentence of each problem as well.

    Args:
        step: the step.
        inner: its own steps.
        known: fields that settings, items and the steps before give.
    """
    if isinstance(step, CheckStep):
        step = step.with_fields()
    if isinstance(step, AskStep) and step.thinking is None and "thinking" in known:
        step = replace(step, thinking="{{ thinking }}")
    values: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for part in step.computed:
        try:
            values[part] = compile_value(getattr(step, part))
        except BadValue as e:
            problems.append((part, str(e)))
            continue
        problems += [(part, said) for said in unknown_names(values[part], known)]
        if part in EXPRESSIONS and isinstance(getattr(step, part), str) and not values[part].is_expression:
            problems.append((part, "must be one {{ expression }}, or a value that is no text"))
    return None if problems else CompiledStep(step, values, inner), problems
