"""A generator from a YAML file: items by a reader's name, prompts, steps, and the record of a sample.

All of a file is checked when it is read: an unknown key, parser or field, a template that reaches for the
inside of Python's objects, or a setting without a sound default is refused before anything is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields as fields_of_class, make_dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from annotated_types import Ge, Le, MinLen

from data_prep.synth.declared.readers import READERS, Reader
from data_prep.synth.declared.steps import VERBS, CompiledStep, Draft, EveryStep, Step, compile_step
from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, Kind
from data_prep.synth.templates import (
    PROMPTS, BadTemplate, Prompt, PromptTemplate, compile_value, fill, fill_known, names_in, unknown_names)
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import (
    ONCE, AtLeastOne, Located, NotBlank, ProblemCode, SettingsError, SettingsProblem, at_most, find_problems,
    read, read_located, read_text)
from megatron_sov.base.settings.options import field_docs
from megatron_sov.base.settings.problem import UNSET

KINDS = ("text", "chat", "prompt", "task")
GIVEN = ("item_id", "before", "part")
"""Fields that every sample has: the id of its item, the fields of the kept samples before it, and its place
among the parts of a reply or list, from 0."""


@dataclass(frozen=True)
class DeclaredSetting:
    """A setting of the generator."""

    default: bool | int | float | str | tuple[str, ...]
    help: str = ""
    """One line for `sov-data synth NAME --list`."""
    min: float | None = None
    max: float | None = None
    options: tuple[str, ...] = ()
    """Values that it, or each item of it, may have; empty: any."""
    at_most: str = ""
    """Another setting that it may not exceed."""

    def type(self) -> Any:
        """Return the type with its bounds, for a dataclass."""
        text: Any = Literal[self.options] if self.options else str
        hint: Any = type(self.default)
        marks: list[Any] = []
        if isinstance(self.default, str):
            hint = text
        elif isinstance(self.default, tuple):
            hint, marks = tuple[text, ...], [ONCE, *([MinLen(1)] if self.options else [])]
        marks += [Ge(self.min)] if self.min is not None else []
        marks += [Le(self.max)] if self.max is not None else []
        marks += [at_most(self.at_most)] if self.at_most else []
        return Annotated[(hint, *marks)] if marks else hint


@dataclass(frozen=True)
class GeneratorFile:
    """The keys of a file."""

    help: NotBlank
    """One line for `sov-data synth --list`."""
    items: str | dict[str, dict[str, Any]]
    """Reader, or reader and its options."""
    prompts: dict[str, Prompt]
    steps: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    record: dict[str, Any]
    """Of a sample: field -> value; or kind -> record, or its expression, where `makes` is a setting."""
    makes: str = "text"
    """Kind of the records: text, chat, prompt or task; or a setting that names it."""
    version: AtLeastOne = 1
    """Raised when the same answers would give other samples."""
    settings: dict[str, DeclaredSetting] = field(default_factory=dict)
    group: str = ""
    """What a sample shares with others of its item."""
    libraries: tuple[str, ...] = ()
    """Modules that it needs and that not every installation has."""


def read_generator(file: Path) -> type[Generator]:
    """Return the generator of a file, as a class.

    Raises:
        UserError: the file cannot be used; each problem is named with its line.
    """
    text = read_text(file)
    located = read_located(text)
    if located.problems:
        raise SettingsError(str(file), located.problems)
    said = read(GeneratorFile, located.value or {}, str(file), lines=located.lines)
    return _Compiler(file, located, said).compile(hashlib.sha256(text.encode()).hexdigest())


class _Compiler:
    """Checks and compiles a file."""

    def __init__(self, file: Path, located: Located, said: GeneratorFile) -> None:
        self._file, self._located, self._said = file, located, said
        self._problems: list[SettingsProblem] = []
        self._asked: dict[str, set[str]] = {}
        """Prompt -> the fields that all steps which ask it know."""

    def compile(self, digest: str) -> type[Generator]:
        said, stem = self._said, self._file.stem
        reader = self._reader()
        for name in said.settings:
            if (not name.isidentifier() or iskeyword(name) or name.startswith("_")
                    or name in ("self", *GIVEN, *reader.names(), *PROMPTS.globals)):
                self._add(("settings", name), "is no name for a setting, or is taken", name,
                          "choose another one")
        for name in {*reader.names()} & PROMPTS.globals.keys():
            self._add(("items",), "is the name of a function, and of no field", name, "rename the field")
        self._refuse()
        settings = self._settings(reader)
        self._check_forms(said.steps, ("steps",))
        self._refuse()  # names mean nothing while a step that gives them is not known
        known = [*GIVEN, *(one.name for one in fields_of_class(settings)), *reader.names()]
        steps, inside = self._steps(said.steps, ("steps",), known, True)
        values = {"record": self._value("record", inside), "group": self._value("group", inside),
                  "makes": self._value("makes", known)}
        if said.makes not in KINDS and "{" not in said.makes:
            self._add(("makes",), f"must be one of {', '.join(KINDS)}, or a template of a setting",
                      said.makes)
        prompts = self._prompts(stem)
        self._refuse()
        return type("Declared", (DeclaredGenerator,), {
            "name": stem, "version": said.version, "help": said.help, "said": said, "reader": reader,
            "steps": steps, "values": values, "compiled_prompts": prompts, "Settings": settings,
            "needs_input": reader.needs_input, "file_digest": digest,
            "libraries": ("py3langid", *said.libraries),
            "kind": said.makes if said.makes in KINDS else "text",
            "help_of_settings": {**field_docs(reader.Settings), **{
                name: one.help for name, one in said.settings.items() if one.help}}})

    def _refuse(self) -> None:
        if self._problems:
            raise SettingsError(str(self._file), self._problems)

    def _add(self, place: tuple[str | int, ...], rule: str, value: Any = UNSET, way_out: str = "") -> None:
        self._problems.append(SettingsProblem(ProblemCode.RULE, ".".join(map(str, place)), rule, value,
                                              way_out, line=self._located.line(place)))

    def _add_all(self, place: tuple[str | int, ...], problems: Sequence[SettingsProblem]) -> None:
        for one in problems:
            self._add((*place, *one.key.split(".")), one.rule, one.value, one.way_out)

    def _reader(self) -> Reader:
        given = self._said.items
        name, options = (given, {}) if isinstance(given, str) else next(iter(given.items()), ("", {}))
        if not isinstance(given, str) and len(given) > 1:
            self._add(("items",), "must be one reader with its options", ", ".join(given))
        if name not in READERS:
            self._add(("items",), f"must be one of {', '.join(READERS)}{nearest(name, list(READERS))}", name)
            self._refuse()
        made, problems = find_problems(READERS[name].Options, options)
        self._add_all(("items", name), problems)
        self._refuse()
        return READERS[name](made, self._file.parent)

    def _settings(self, reader: Reader) -> type[Any]:
        """Return a dataclass of the reader's settings and the file's, whose defaults go first."""
        hints = get_type_hints(reader.Settings, include_extras=True)
        times = getattr(reader.options, "times", "")
        if times and times not in self._said.settings:
            self._add(("items", "records", "times"), "names no setting", times, "name one of the file")
        own: list[tuple[str, Any, Any]] = []
        for name, setting in self._said.settings.items():
            if setting.at_most and setting.at_most not in {*self._said.settings, *hints}:
                self._add(("settings", name), "names no setting", setting.at_most,
                          "name another one of the file")
            own.append((name, hints.get(name) or setting.type(), field(default=setting.default)))
        self._refuse()
        made = make_dataclass("Settings", own, bases=(reader.Settings,), frozen=True)
        _, problems = find_problems(made, {name: one.default for name, one in self._said.settings.items()})
        for one in problems:
            self._add(("settings", one.key.split(".")[0], "default"), one.rule, one.value, one.way_out)
        return made

    def _check_forms(self, raw: Sequence[Mapping[str, Any]], place: tuple[str | int, ...]) -> None:
        for number, entry in enumerate(raw):
            step = self._step(entry, (*place, number))
            if isinstance(step, EveryStep):
                self._check_forms(step.do, (*place, number, "do"))

    def _step(self, entry: Mapping[str, Any], here: tuple[str | int, ...]) -> Step | None:
        verbs = [name for name in VERBS if name in entry]
        if len(verbs) != 1:
            keys = ", ".join(map(str, entry))
            self._add(here, f"must have one of the keys {', '.join(VERBS)}", keys,
                      "" if verbs else nearest(keys, list(VERBS)).removeprefix("; "))
            return None
        step, problems = find_problems(VERBS[verbs[0]], entry)
        self._add_all(here, problems)
        said = list(step.problems(self._said.prompts)) if step else []
        said += [(verbs[0], f"names the function {name!r}; rename the field")
                 for name in (step.gives() if step and not said else ()) if name in PROMPTS.globals]
        for part, rule in said:
            self._add((*here, *part.split(".")), rule)
        return None if said else step

    def _steps(self, raw: Sequence[Mapping[str, Any]], place: tuple[str | int, ...], known: Sequence[str],
               may_divide: bool) -> tuple[tuple[CompiledStep, ...], list[str]]:
        """Return compiled steps, and the fields that are known after them."""
        found: list[CompiledStep] = []
        inside = list(known)
        for number, entry in enumerate(raw):
            here = (*place, number)
            step = self._step(entry, here)
            assert step is not None  # `_check_forms` has seen it
            if step.divides and not may_divide:
                self._add(here, "would divide the sample, which steps of `every` may not",
                          way_out="move it to `steps`")
            inner: tuple[CompiledStep, ...] = ()
            if isinstance(step, EveryStep):
                inner, more = self._steps(step.do, (*here, "do"), [*inside, *step.gives()], False)
                inside += [name for name in more if name not in step.gives()]
            compiled, problems = compile_step(step, inner, inside)
            for part, rule in problems:
                self._add((*here, part), rule)
            if asked := getattr(step, "ask", None):
                self._asked[asked] = self._asked.get(asked, set(inside)) & set(inside)
            inside += step.gives()
            found += [compiled] if compiled else []
        return tuple(found), inside

    def _value(self, key: str, known: Sequence[str]) -> Any:
        try:
            value = compile_value(getattr(self._said, key))
        except BadTemplate as e:
            self._add((key,), str(e))
            return None
        for said in unknown_names(names_in(value), known):
            self._add((key,), said)
        return value

    def _prompts(self, stem: str) -> dict[str, PromptTemplate]:
        found = {}
        for name, prompt in self._said.prompts.items():
            if name not in self._asked:
                self._add(("prompts", name), "is asked by no step", way_out="add a step, or remove it")
                continue
            try:
                made = found[f"{stem}/{name}"] = PromptTemplate.compile(f"{stem}/{name}", prompt)
            except BadTemplate as e:
                self._add(("prompts", name), str(e))
                continue
            for said in unknown_names(made.names, self._asked[name]):
                self._add(("prompts", name), said)
        return found


class DeclaredGenerator(Generator):
    """Makes samples as a file says."""

    said: ClassVar[GeneratorFile]
    reader: ClassVar[Reader]
    steps: ClassVar[Sequence[CompiledStep]]
    values: ClassVar[Mapping[str, Any]]
    """record, group and makes -> compiled value."""
    compiled_prompts: ClassVar[Mapping[str, PromptTemplate]]
    file_digest: ClassVar[str]

    @classmethod
    def prompts(cls) -> dict[str, PromptTemplate]:
        return dict(cls.compiled_prompts)

    @classmethod
    def digests(cls) -> dict[str, str]:
        return {f"{cls.name}.yaml": cls.file_digest}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._settings = {one.name: getattr(settings, one.name) for one in fields_of_class(settings)}
        kind = fill(self.values["makes"], self._settings)
        if kind not in KINDS:
            raise UserError(f"{self.name}: makes = {kind!r} must be one of {', '.join(KINDS)}")
        if self.said.makes not in KINDS and kind not in self.said.record:
            raise UserError(f"{self.name}: record has no key {kind!r}, which `makes` names; add the record "
                            "of this kind to the generator's file")
        self.kind: Kind = kind

    def files(self) -> Sequence[Path]:
        return self.reader.files(self.settings)

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the reader's items; raises UserError as it does."""
        return self.reader.items(inputs, self.settings)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Run the steps on one item."""
        prepared = self.reader.prepare(item, self.settings)
        if isinstance(prepared, GeneratedSample):
            yield prepared
            return
        draft = Draft({**self._settings, **prepared, "item_id": item.id, "before": [], "part": 0})
        yield from self._from(0, draft, ask, [])

    def _from(self, place: int, draft: Draft, ask: Ask, kept: list[Draft]) -> Iterator[GeneratedSample]:
        """Run the steps from a place on; a draft that is kept is added to `kept`."""
        for number, step in enumerate(self.steps[place:], place + 1):
            parts = step.run(draft, ask, self.name)
            if draft.has_failed:
                break
            if parts is not None:
                siblings: list[Draft] = []
                for part in parts:
                    part.fields["before"] = [one.fields for one in siblings]
                    yield from self._from(number, part, ask, siblings)
                kept += siblings
                return
        if not draft.has_failed:
            kept.append(draft)
        record = self.values["record"]
        if self.said.makes not in KINDS:  # a record of each kind where a setting chooses between kinds
            record = record[self.kind]
        filled = {**fill_known(record, draft.fields), **({"text": draft.unread} if draft.unread else {})}
        group = self.values["group"]
        yield GeneratedSample(filled, tuple(draft.verdicts),
                              str(group(draft.fields)) if group.names <= draft.fields.keys() else "",
                              dict(draft.notes))
