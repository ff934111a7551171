"""Steps in generator files: a step changes, divides or checks a draft sample.

The first failed check ends a draft, so that no further requests are sent for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self, cast

from annotated_types import Len, MinLen

from data_prep.synth.declared.conversation import Player
from data_prep.synth.declared.parsers import PARSERS, ResponseParser
from data_prep.synth.declared.templates import (
    BadTemplate, CompiledValue, collect_field_names, compile_value, compute_value, find_unknown_names)
from data_prep.synth.replies import NoUsableReply, ReplyText
from data_prep.synth.requests import Requester
from data_prep.synth.samples import SampleVerdict
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import AtLeastOne, NotBlank

EXPRESSION_PARTS = frozenset((
    "play", "number", "when", "that", "count", "least", "temperature", "max_tokens"))
"""Step parts that must be one `{{ expression }}` or a non-text value."""
MAX_UNPARSED_CHARS = 2000
"""Characters from an unparsable reply in the rejected sample."""


@dataclass
class Draft:
    """A sample while the steps run."""

    fields: dict[str, Any]
    verdicts: list[SampleVerdict] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    unparsed_reply: str = ""
    """Beginning of an unparsable reply."""

    @property
    def has_failed(self) -> bool:
        return any(not verdict.passed for verdict in self.verdicts)

    def split_draft(self, parts: Sequence[Mapping[str, Any]]) -> "list[Draft]":
        """Return a draft for each mapping in `parts`; the field `part` holds the index."""
        return [Draft({**self.fields, **part, "part": index}, list(self.verdicts), dict(self.notes))
                for index, part in enumerate(parts)]

    def add_verdict(self, check: str, passed: bool, detail: str = "") -> None:
        self.verdicts.append(SampleVerdict(check, passed, detail))


@dataclass(frozen=True, kw_only=True)
class GeneratorStep:
    """One entry in `steps`; `compile_parts` replaces the texts in its parts by compiled values."""

    when: bool | str = True
    """Condition for running the step: an expression."""
    computed_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that are compiled values, in addition to `when`."""
    required_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that the step reads directly."""
    divides_sample: ClassVar[bool] = False

    def list_set_fields(self) -> list[str]:
        return []

    def find_problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (part, problem sentence), except problems in compiled values."""
        yield from ()

    def compile_parts(self, known: Sequence[str]) -> tuple[Self, list[tuple[str, str]]]:
        """Return the step with compiled parts, and (part, sentence) for each problem. `known`: fields from
        settings, items and earlier steps."""
        compiled: dict[str, Any] = {}
        problems = [("parse", problem) for problem in find_unknown_names(self.required_fields, known)]
        for part in ("when", *self.computed_parts):
            raw = getattr(self, part)
            try:
                value = compile_value(raw)
            except BadTemplate as e:
                problems.append((part, str(e)))
                continue
            problems += [(part, problem) for problem in find_unknown_names(collect_field_names(value), known)]
            is_expression = isinstance(value, CompiledValue) and value.is_expression
            if part in EXPRESSION_PARTS and isinstance(raw, str) and not is_expression:
                problems.append((part, "must be one {{ expression }}, or a value that is no text"))
            compiled[part] = value
        return replace(self, **compiled), problems

    def run_step(self, draft: Draft, requester: Requester) -> Sequence[Draft] | None:
        """Run the compiled step on a draft; return replacement drafts if the step divides the sample. Raises
        `UserError`: a value has the wrong type for the step."""
        if not compute_value(self.when, draft.fields):
            return None
        values = {part: compute_value(getattr(self, part), draft.fields) for part in self.computed_parts}
        try:
            return self.apply_step(values, draft, requester)
        except (TypeError, ValueError, AttributeError, KeyError) as e:
            raise UserError(f"a step with {', '.join(values)} cannot run ({type(e).__name__}: {e}); mend the "
                            "step in the generator's file") from None

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester
                   ) -> Sequence[Draft] | None:
        """Change a draft, or return replacement drafts."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AskStep(GeneratorStep):
    """Send a prompt to the writer."""

    ask: str
    into: str = "reply"
    """Field for the reply text, or for the list if `count` is set."""
    count: AtLeastOne | str | None = None
    """Number of replies; None: a single text."""
    temperature: float | str = "{{ temperature }}"
    max_tokens: int | str = "{{ max_tokens }}"
    attempts: AtLeastOne = 3
    """Requests for one usable reply."""
    may_fail: bool = False
    """Whether steps continue with an empty text or list if no reply is usable; else the item ends without
    samples."""
    computed_parts: ClassVar[tuple[str, ...]] = ("count", "temperature", "max_tokens")

    def list_set_fields(self) -> list[str]:
        return [self.into]

    def find_problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from _find_prompt_problems("ask", self.ask, prompts)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        count = values["count"]
        try:
            replies = requester.request_replies(
                self.ask, draft.fields, count=count or 1, temperature=values["temperature"],
                max_tokens=values["max_tokens"], thinking=draft.fields.get("thinking"),
                attempts=self.attempts)
        except NoUsableReply:
            if not self.may_fail:
                raise
            replies = []
        texts = [ReplyText.from_reply(reply) for reply in replies]
        if count is None:
            draft.fields[self.into] = texts[0] if texts else ReplyText("")
        else:
            draft.fields[self.into] = texts


def _find_prompt_problems(part: str, name: str, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if name not in prompts:
        yield part, (f"must be one of the file's prompts ({', '.join(prompts)})"
                     f"{suggest_name(name, list(prompts))}")


@dataclass(frozen=True, kw_only=True)
class ParseStep(GeneratorStep):
    """Parse `reply`; fails as `complete` if the reply was cut off, and as `name` if unparsable."""

    parse: Annotated[dict[str, Any], Len(1, 1)]
    """Parser -> argument."""
    name: str = "form"
    required_fields: ClassVar[tuple[str, ...]] = ("reply",)

    @property
    def parser(self) -> ResponseParser:
        return PARSERS[next(iter(self.parse))]

    @property
    def argument(self) -> Any:
        return next(iter(self.parse.values()))

    @property
    def divides_sample(self) -> bool:  # type: ignore[override]
        return self.parser.returns_list

    def list_set_fields(self) -> list[str]:
        return list(self.parser.find_field_names(self.argument))

    def find_problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        name = next(iter(self.parse))
        if name not in PARSERS:
            yield "parse", f"must be one of {', '.join(PARSERS)}{suggest_name(name, list(PARSERS))}"
            return
        names = self.parser.find_field_names(self.argument)
        if isinstance(names, str):
            yield "parse", f"{name}: {names}"

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester
                   ) -> Sequence[Draft] | None:
        reply = draft.fields["reply"]
        fields = self.parser.parse(reply, self.argument)
        draft.add_verdict("complete", not reply.cut, "cut off at the limit of tokens" if reply.cut else "")
        if fields is None or reply.cut:
            draft.add_verdict(self.name, fields is not None, "does not have the form that was asked for")
            draft.unparsed_reply = reply[:MAX_UNPARSED_CHARS]
            return None
        if self.divides_sample:
            return draft.split_draft(fields)
        draft.fields.update(fields)
        return None


@dataclass(frozen=True, kw_only=True)
class EachStep(GeneratorStep):
    """Divide a sample into a sample for each list value."""

    each: Annotated[dict[str, Any], Len(1, 1)]
    """Field -> list."""
    computed_parts: ClassVar[tuple[str, ...]] = ("each",)
    divides_sample: ClassVar[bool] = True

    def list_set_fields(self) -> list[str]:
        return list(self.each)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> Sequence[Draft]:
        (name, items), = values["each"].items()
        return draft.split_draft([{name: item} for item in _check_list(name, items)])


@dataclass(frozen=True, kw_only=True)
class EveryStep(GeneratorStep):
    """Run the steps `do` for each list value, on the same sample."""

    every: Annotated[dict[str, Any], Len(1, 1)]
    """Field -> list."""
    do: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    """Steps that divide no sample; in a compiled step, compiled steps."""
    computed_parts: ClassVar[tuple[str, ...]] = ("every",)

    def list_set_fields(self) -> list[str]:
        return list(self.every)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        (name, items), = values["every"].items()
        for item in _check_list(name, items):
            draft.fields[name] = item
            for step in cast("tuple[GeneratorStep, ...]", self.do):
                step.run_step(draft, requester)
                if draft.has_failed:
                    return


@dataclass(frozen=True, kw_only=True)
class SetStep(GeneratorStep):
    set: Annotated[dict[str, Any], MinLen(1)]
    computed_parts: ClassVar[tuple[str, ...]] = ("set",)

    def list_set_fields(self) -> list[str]:
        return list(self.set)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        draft.fields.update(values["set"])


@dataclass(frozen=True, kw_only=True)
class NoteStep(GeneratorStep):
    """Add figures to a sample's notes, which are not trained on."""

    note: Annotated[dict[str, Any], MinLen(1)]
    computed_parts: ClassVar[tuple[str, ...]] = ("note",)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        draft.notes.update(values["note"])


@dataclass(frozen=True, kw_only=True)
class JudgeStep(GeneratorStep):
    """Request a grade from 0 to 10 from the judge."""

    judge: NotBlank
    """Rubric."""
    material: Annotated[dict[str, str], MinLen(1)]
    """Name -> text, fenced in the judge's prompt."""
    name: str = ""
    """Check name after `judge: `."""
    least: float | str = 0.0
    """Lowest passing grade; unused with `into`."""
    into: str = ""
    """Field for the grade; no check."""
    computed_parts: ClassVar[tuple[str, ...]] = ("judge", "material", "least")

    def list_set_fields(self) -> list[str]:
        return [self.into] if self.into else []

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        if self.into:
            draft.fields[self.into] = requester.request_grade(values["judge"], values["material"])
            return
        check = f"judge: {self.name}" if self.name else "judge"
        try:
            grade = requester.request_grade(values["judge"], values["material"])
        except NoUsableReply as e:
            draft.add_verdict(check, False, str(e))
            return
        draft.add_verdict(check, grade >= values["least"], f"grade {grade:g}, at least {values['least']:g}")


@dataclass(frozen=True, kw_only=True)
class ThatStep(GeneratorStep):
    """Check that an expression is true, or add the returned `SampleVerdict` or list."""

    that: NotBlank
    name: NotBlank
    """Check name, except for returned verdicts."""
    detail: str = ""
    """Explains a failed check."""
    computed_parts: ClassVar[tuple[str, ...]] = ("that", "detail")

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        result = values["that"]
        verdicts = result if isinstance(result, list) else [result]
        if verdicts and all(isinstance(verdict, SampleVerdict) for verdict in verdicts):
            draft.verdicts += verdicts
        else:
            draft.add_verdict(self.name, bool(result), "" if result else str(values["detail"]))


@dataclass(frozen=True, kw_only=True)
class PlayStep(GeneratorStep):
    """Play a conversation about a `virtual` task, up to `max_turns`, into the field `played`."""

    play: str
    """Task: an expression."""
    number: int | str = 0
    """Index among the item's conversations, for seeds."""
    user: str = ""
    """Prompt with which the writer plays the user, with the field `heard`; "": the user asks the task's
    question once."""
    computed_parts: ClassVar[tuple[str, ...]] = ("play", "number")
    required_fields: ClassVar[tuple[str, ...]] = ("max_turns", "temperature", "max_tokens")

    def list_set_fields(self) -> list[str]:
        return ["played"]

    def find_problems(self, prompts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if self.user:
            yield from _find_prompt_problems("user", self.user, prompts)

    def apply_step(self, values: Mapping[str, Any], draft: Draft, requester: Requester) -> None:
        player = Player(requester, draft.fields, values["number"], self.user)
        draft.fields["played"] = player.play_conversation(values["play"])


VERBS: Mapping[str, type[GeneratorStep]] = {
    "ask": AskStep, "parse": ParseStep, "each": EachStep, "every": EveryStep, "set": SetStep,
    "note": NoteStep, "judge": JudgeStep, "play": PlayStep, "that": ThatStep}
"""Key in a `steps` entry -> step class."""


def _check_list(name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} = {str(value)[:60]!r} must be a list; mend the step in the generator's file")
    return value
