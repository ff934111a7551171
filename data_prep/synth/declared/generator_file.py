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

from data_prep.synth.declared.readers import READERS, Reader, RecordOptions
from data_prep.synth.declared.steps import VERBS, CompiledStep, Draft, EveryStep, Step, compile_step
from data_prep.synth.generator import KINDS, Ask, GeneratedSample, Generator, GeneratorItem
from data_prep.synth.templates import (
    PROMPTS, BadTemplate, Prompt, PromptTemplate, compile_value, fill_known, names_in, unknown_names)
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import (
    UNIQUE_ITEMS, AtLeastOne, LocatedDocument, NotBlank, ProblemCode, SettingsError, SettingsProblem,
    at_most_field, parse_located_yaml, parse_settings, read_settings_text, try_parse_settings)
from megatron_sov.base.settings.options import get_field_help
from megatron_sov.base.settings.problem import UNSET

GIVEN = ("item_id", "part")
"""Fields that every sample has: the id of its item, and its place among the parts of a reply or list, from
0."""
Place = tuple[str | int, ...]
"""Keys and numbers that lead to a part of the file."""


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
            hint, marks = tuple[text, ...], [UNIQUE_ITEMS, *([MinLen(1)] if self.options else [])]
        marks += [Ge(self.min)] if self.min is not None else []
        marks += [Le(self.max)] if self.max is not None else []
        marks += [at_most_field(self.at_most)] if self.at_most else []
        return Annotated[(hint, *marks)] if marks else hint


@dataclass(frozen=True)
class GeneratorFile:
    """The keys of a file."""

    help: NotBlank
    """One line for `sov-data synth --list`."""
    items: str | dict[str, dict[str, Any]]
    """Reader, or `records` and its options."""
    prompts: dict[str, Prompt]
    steps: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    record: dict[str, Any]
    """Of a sample: field -> value; or kind -> record, or its expression, where `makes` is a setting."""
    makes: str = "text"
    """Kind of the records: text, chat, prompt or task; or the setting that names it."""
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
    text = read_settings_text(file)
    located = parse_located_yaml(text)
    if located.problems:
        raise SettingsError(str(file), located.problems)
    said = parse_settings(GeneratorFile, located.value or {}, str(file), lines=located.lines)
    return _Compiler(file, located, said).compile(hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class _ReadStep:
    """A step whose form is sound, with its place in the file."""

    step: Step
    place: Place
    inner: list[_ReadStep]
    """Steps of `every`."""


class _Compiler:
    """Checks and compiles a file."""

    def __init__(self, file: Path, located: LocatedDocument, said: GeneratorFile) -> None:
        self._file, self._located, self._said = file, located, said
        self._problems: list[SettingsProblem] = []
        self._asked: dict[str, set[str]] = {}
        """Prompt -> the fields that all steps which ask it know."""

    def compile(self, digest: str) -> type[Generator]:
        said, stem = self._said, self._file.stem
        reader = self._reader()
        taken = {"self", *GIVEN, *reader.fields, *PROMPTS.globals}
        for name in said.settings:
            if not name.isidentifier() or iskeyword(name) or name.startswith("_") or name in taken:
                self._add(("settings", name), "is no name for a setting, or is taken", name,
                          "choose another one")
        self._refuse_functions(("items",), reader.fields)
        self._refuse()
        settings = self._settings(reader)
        read_steps = self._read_steps(said.steps, ("steps",))
        self._refuse()  # names mean nothing while a step that gives them is not known
        names = [one.name for one in fields_of_class(settings)]
        known = [*GIVEN, *names, *reader.fields]
        steps, inside = self._compile_steps(read_steps, known)
        record, group = self._value("record", inside), self._value("group", inside)
        if said.makes not in (*KINDS, *names):
            self._add(("makes",), f"must be one of {', '.join(KINDS)}, or a setting", said.makes)
        prompts = self._prompts()
        self._refuse()
        return type("Declared", (DeclaredGenerator,), {
            "name": stem, "version": said.version, "help": said.help, "said": said, "reader": reader,
            "steps": steps, "record": record, "group": group, "compiled_prompts": prompts,
            "Settings": settings, "needs_input": reader.needs_input, "file_digest": digest,
            "libraries": ("py3langid", *said.libraries),
            "kind": said.makes if said.makes in KINDS else "text",
            "help_of_settings": {**get_field_help(reader.Settings), **{
                name: one.help for name, one in said.settings.items() if one.help}}})

    def _refuse(self) -> None:
        if self._problems:
            raise SettingsError(str(self._file), self._problems)

    def _add(self, place: Place, rule: str, value: Any = UNSET, way_out: str = "") -> None:
        self._problems.append(SettingsProblem(ProblemCode.RULE, ".".join(map(str, place)), rule, value,
                                              way_out, line=self._located.line(place)))

    def _add_all(self, place: Place, problems: Sequence[SettingsProblem]) -> None:
        for one in problems:
            self._add((*place, *one.key.split(".")), one.rule, one.value, one.way_out)

    def _refuse_functions(self, place: Place, names: Sequence[str]) -> None:
        for name in names:
            if name in PROMPTS.globals:
                self._add(place, "is the name of a function, and of no field", name, "rename the field")

    def _reader(self) -> Reader:
        given = self._said.items
        if isinstance(given, str) and given in READERS:
            return READERS[given]
        options: RecordOptions | None = None
        if not isinstance(given, str) and set(given) == {"records"}:
            options, problems = try_parse_settings(RecordOptions, given["records"])
            self._add_all(("items", "records"), problems)
        else:
            close = suggest_name(given, list(READERS)) if isinstance(given, str) else ""
            self._add(("items",), f"must be {', '.join(READERS)} or {{records: {{fields: [...]}}}}{close}",
                      given)
        self._refuse()
        assert options is not None  # else there was a problem
        if options.times and options.times not in self._said.settings:
            self._add(("items", "records", "times"), "names no setting", options.times,
                      "name one of the file")
        return options.reader(self._file.parent)

    def _settings(self, reader: Reader) -> type[Any]:
        """Return a dataclass of the reader's settings and the file's, whose defaults go first."""
        hints = get_type_hints(reader.Settings, include_extras=True)
        own: list[tuple[str, Any, Any]] = []
        for name, setting in self._said.settings.items():
            if setting.at_most and setting.at_most not in {*self._said.settings, *hints}:
                self._add(("settings", name), "names no setting", setting.at_most,
                          "name another one of the file")
            own.append((name, hints.get(name) or setting.type(), field(default=setting.default)))
        self._refuse()
        made = make_dataclass("Settings", own, bases=(reader.Settings,), frozen=True)
        _, problems = try_parse_settings(made,
                                         {name: one.default for name, one in self._said.settings.items()})
        for one in problems:
            self._add(("settings", one.key.split(".")[0], "default"), one.rule, one.value, one.way_out)
        return made

    def _read_steps(self, raw: Sequence[Mapping[str, Any]], place: Place) -> list[_ReadStep]:
        """Return the steps whose form is sound, and note the problems of the others."""
        found: list[_ReadStep] = []
        for number, entry in enumerate(raw):
            here = (*place, number)
            verbs = [name for name in VERBS if name in entry]
            if len(verbs) != 1:
                keys = ", ".join(map(str, entry))
                self._add(here, f"must have one of the keys {', '.join(VERBS)}", keys,
                          "" if verbs else suggest_name(keys, list(VERBS)).removeprefix("; "))
                continue
            step, problems = try_parse_settings(VERBS[verbs[0]], entry)
            self._add_all(here, problems)
            rules = list(step.problems(self._said.prompts)) if step else []
            for part, rule in rules:
                self._add((*here, part), rule)
            if step is None or rules:
                continue
            self._refuse_functions((*here, verbs[0]), step.gives())
            if step.divides and place != ("steps",):
                self._add(here, "would divide the sample, which steps of `every` may not",
                          way_out="move it to `steps`")
            inner = self._read_steps(step.do, (*here, "do")) if isinstance(step, EveryStep) else []
            found.append(_ReadStep(step, here, inner))
        return found

    def _compile_steps(self, steps: Sequence[_ReadStep], known: Sequence[str]
                       ) -> tuple[tuple[CompiledStep, ...], list[str]]:
        """Return compiled steps, and the fields that are known after them."""
        found: list[CompiledStep] = []
        known = list(known)
        for one in steps:
            inner, after = self._compile_steps(one.inner, [*known, *one.step.gives()])
            compiled, problems = compile_step(one.step, inner, known)
            for part, rule in problems:
                self._add((*one.place, part), rule)
            if asked := getattr(one.step, "ask", "") or getattr(one.step, "user", ""):
                self._asked[asked] = self._asked.get(asked, set(known)) & set(known)
            known = after
            found.append(compiled)
        return tuple(found), known

    def _value(self, key: str, known: Sequence[str]) -> Any:
        try:
            value = compile_value(getattr(self._said, key))
        except BadTemplate as e:
            self._add((key,), str(e))
            return None
        for said in unknown_names(names_in(value), known):
            self._add((key,), said)
        return value

    def _prompts(self) -> dict[str, PromptTemplate]:
        found = {}
        for name, prompt in self._said.prompts.items():
            if name not in self._asked:
                self._add(("prompts", name), "is asked by no step", way_out="add a step, or remove it")
                continue
            full_name = f"{self._file.stem}/{name}"
            try:
                found[full_name] = PromptTemplate.compile(full_name, prompt)
            except BadTemplate as e:
                self._add(("prompts", name), str(e))
                continue
            for said in unknown_names(found[full_name].names, self._asked[name]):
                self._add(("prompts", name), said)
        return found


class DeclaredGenerator(Generator):
    """Makes samples as a file says."""

    said: ClassVar[GeneratorFile]
    reader: ClassVar[Reader]
    steps: ClassVar[Sequence[CompiledStep]]
    record: Any
    """Compiled."""
    group: ClassVar[Any]
    """Compiled."""
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
        if self.said.makes in KINDS:
            return
        # a setting chooses between kinds: the file has a record of each
        self.kind = self._settings[self.said.makes]
        if self.kind not in KINDS or self.kind not in self.said.record:
            raise UserError(f"{self.name}: {self.said.makes} = {self.kind!r} must be one of "
                            f"{', '.join(KINDS)} and have a record in the generator's file")
        self.record = self.record[self.kind]

    def files(self) -> Sequence[Path]:
        return self.reader.files(self.settings)

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the reader's items; raises UserError as it does."""
        return self.reader.items(inputs, self.settings)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Run the steps on one item."""
        prepared = self.reader.prepare(item, self.settings)
        yield from self._run_steps(
            self.steps, Draft({**self._settings, **prepared, "item_id": item.id, "part": 0}), ask)

    def _run_steps(self, steps: Sequence[CompiledStep], draft: Draft, ask: Ask) -> Iterator[GeneratedSample]:
        for number, step in enumerate(steps, 1):
            parts = step.run(draft, ask, self.name)
            if draft.has_failed:
                break
            if parts is not None:
                for part in parts:
                    yield from self._run_steps(steps[number:], part, ask)
                return
        record = fill_known(self.record, draft.fields)
        if draft.unread:
            record = {**record, "text": draft.unread}
        group = str(self.group(draft.fields)) if self.group.names <= draft.fields.keys() else ""
        yield GeneratedSample(record, tuple(draft.verdicts), group, dict(draft.notes))
