"""A generator from a YAML file: items by a reader's name, prompts, steps, and the record of a sample.

All of a file is checked when it is read: an unknown key, check or field, a template that reaches for the
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

from data_prep.curate.decontamination.step import benchmark_files
from data_prep.synth.declared.readers import READERS, Reader
from data_prep.synth.declared.steps import VERBS, CompiledStep, Draft, EveryStep, Step, compile_step
from data_prep.synth.declared.values import (
    ENVIRONMENT, BadValue, compile_value, fill, fill_known, unknown_names)
from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, Kind
from data_prep.synth.templates import PROMPTS, PromptTemplate, load_prompts, parse_prompt
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import (
    ONCE, AtLeastOne, Located, NotBlank, ProblemCode, SettingsError, SettingsProblem, at_most, find_problems,
    only_with, read, read_located, read_text)
from megatron_sov.base.settings.problem import UNSET

KINDS = ("text", "chat", "prompt", "task")
GIVEN = ("item_id", "before", "part")
"""Fields that every sample has: the id of its item, the fields of the kept samples before it, and its place
among the parts of a reply or list, from 0."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: a Jinja template for each message."""

    user: NotBlank
    system: str = ""


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
    only_with: str = ""
    """Another setting without which it does nothing."""
    files: bool = False
    """Whether it lists files or folders of JSON lines: they must exist, and belong to what made a run."""

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
        marks += [only_with(self.only_with)] if self.only_with else []
        return Annotated[(hint, *marks)] if marks else hint


@dataclass(frozen=True)
class Together:
    """One sample made of the kept samples of a reply, in the place of each by itself."""

    record: dict[str, Any]
    when: bool | str = True
    least: int | str = 1
    """Kept samples that it needs."""
    name: str = "number of samples"
    """Of the check that there are so many."""
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """A sample of another kind beside each kept one."""

    makes: Literal["text", "chat", "prompt", "task"]
    record: dict[str, Any]
    steps: tuple[dict[str, Any], ...] = ()
    when: bool | str = True


@dataclass(frozen=True)
class GeneratorFile:
    """What a file says."""

    help: NotBlank
    """One line for `sov-data synth --list`."""
    items: str | dict[str, dict[str, Any]]
    """Reader, or reader and its options."""
    prompts: dict[str, Prompt]
    """Name -> prompt."""
    steps: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    record: dict[str, Any]
    """Of a sample: field -> value; or kind -> record where `makes` is a setting."""
    makes: str = "text"
    """Kind of the records: text, chat, prompt or task; or a setting that names it."""
    version: AtLeastOne = 1
    """Raised when the same answers would give other samples."""
    settings: dict[str, DeclaredSetting] = field(default_factory=dict)
    group: str = ""
    """What a sample shares with others of its item."""
    together: Together | None = None
    beside: tuple[Beside, ...] = ()


@dataclass(frozen=True)
class CompiledFile:
    """A file that is sound."""

    stem: str
    said: GeneratorFile
    reader: Reader
    steps: tuple[CompiledStep, ...]
    values: Mapping[str, Any]
    """Name of a part outside of steps -> its value."""
    beside: tuple[tuple[CompiledStep, ...], ...]


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
    return _Compiler(file, located, said).generator(hashlib.sha256(text.encode()).hexdigest())


class _Compiler:
    """Checks and compiles what a file says."""

    def __init__(self, file: Path, located: Located, said: GeneratorFile) -> None:
        self._file, self._located, self._said = file, located, said
        self._problems: list[SettingsProblem] = []
        self._asked: dict[str, set[str]] = {}
        """Prompt -> the fields that all steps which ask it know."""

    def generator(self, digest: str) -> type[Generator]:
        said, stem = self._said, self._file.stem
        reader = self._reader()
        for name in said.settings:
            if (not name.isidentifier() or iskeyword(name) or name.startswith("_")
                    or name in ("self", *GIVEN, *reader.names(), *ENVIRONMENT.globals)):
                self._add(("settings", name), "is no name for a setting, or is taken", name,
                          "choose another one")
        if self._problems:
            raise SettingsError(str(self._file), self._problems)
        settings = self._settings(reader)
        known = [*GIVEN, *(one.name for one in fields_of_class(settings)), *reader.names()]
        self._check_forms(said.steps, ("steps",))
        for place, one in enumerate(said.beside):
            self._check_forms(one.steps, ("beside", place, "steps"))
        if self._problems:  # names mean nothing while a step that gives them is not known
            raise SettingsError(str(self._file), self._problems)
        steps, inside = self._steps(said.steps, ("steps",), known)
        values = self._values(known, inside)
        if said.together and sum(step.step.divides for step in steps) != 1:
            self._add(("together",), "needs one step that divides the sample, such as a `parse` of a list")
        beside = []
        for place, one in enumerate(said.beside):
            compiled, more = self._steps(one.steps, ("beside", place, "steps"), inside, may_divide=False)
            beside.append(compiled)
            values[f"beside.{place}.record"] = self._value(one.record, ("beside", place, "record"), more)
            values[f"beside.{place}.when"] = self._value(one.when, ("beside", place, "when"), inside)
        texts = self._prompts(stem)
        if self._problems:
            raise SettingsError(str(self._file), self._problems)
        compiled_file = CompiledFile(stem, said, reader, steps, values, tuple(beside))
        return type("Declared", (DeclaredGenerator,), {
            "name": stem, "version": said.version, "help": said.help, "file": compiled_file,
            "templates": {f"{stem}/{name}": sorted(self._asked.get(name, ())) for name in said.prompts},
            "texts": texts, "Settings": settings, "needs_input": reader.needs_input,
            "kind": said.makes if said.makes in KINDS else "text", "libraries": ("py3langid",),
            "help_of_settings": {name: one.help for name, one in said.settings.items() if one.help},
            "digests": {f"{stem}.yaml": digest}})

    def _add(self, place: tuple[str | int, ...], rule: str, value: Any = UNSET, way_out: str = "") -> None:
        self._problems.append(SettingsProblem(ProblemCode.RULE, ".".join(map(str, place)), rule, value,
                                              way_out, line=self._located.line(place)))

    def _reader(self) -> Reader:
        given = self._said.items
        name, options = (given, {}) if isinstance(given, str) else next(iter(given.items()), ("", {}))
        if name not in READERS:
            self._add(("items",), f"must be one of {', '.join(READERS)}{nearest(name, list(READERS))}", name)
            raise SettingsError(str(self._file), self._problems)
        reader = READERS[name]
        made, problems = find_problems(reader.Options, options)
        for one in problems:
            place = ("items", name, *one.key.split("."))
            self._add(place, one.rule, one.value, one.way_out)
        if made is None:
            raise SettingsError(str(self._file), self._problems)
        return reader(made)

    def _settings(self, reader: Reader) -> type[Any]:
        """Return a dataclass of the reader's settings and the file's, whose defaults go first."""
        of_reader = {one.name: one for one in fields_of_class(reader.Settings)}
        hints = get_type_hints(reader.Settings, include_extras=True)
        own: list[tuple[str, Any, Any]] = []
        for name, setting in self._said.settings.items():
            hint = hints.get(name) or setting.type()
            for other in filter(None, (setting.at_most, setting.only_with)):
                if other not in {*self._said.settings, *of_reader}:
                    self._add(("settings", name), "names no setting", other, "name another one of the file")
            own.append((name, hint, field(default=setting.default)))
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

    def _steps(self, raw: Sequence[Mapping[str, Any]], place: tuple[str | int, ...], known: Sequence[str],
               *, may_divide: bool = True) -> tuple[tuple[CompiledStep, ...], list[str]]:
        """Return compiled steps, and the fields that are known after them."""
        found: list[CompiledStep] = []
        inside = list(known)
        for number, entry in enumerate(raw):
            here = (*place, number)
            step = self._step(entry, here)
            assert step is not None  # `_check_forms` has seen it
            if step.divides and not may_divide:
                self._add(here, "would divide the sample, which steps of `every` and `beside` may not",
                          way_out="move it to `steps`")
            inner: tuple[CompiledStep, ...] = ()
            if isinstance(step, EveryStep):
                inner, more = self._steps(step.do, (*here, "do"), [*inside, *step.gives()], may_divide=False)
                inside += [name for name in more if name not in step.gives()]
            compiled, problems = compile_step(step, inner, inside)
            for part, rule in problems:
                self._add((*here, part), rule)
            if asked := getattr(step, "ask", None):
                self._asked[asked] = self._asked.get(asked, set(inside)) & set(inside)
            inside += step.gives()
            found += [compiled] if compiled else []
        return tuple(found), inside

    def _step(self, entry: Mapping[str, Any], here: tuple[str | int, ...]) -> Step | None:
        verbs = [name for name in VERBS if name in entry]
        if len(verbs) != 1:
            keys = ", ".join(map(str, entry))
            self._add(here, f"must have one of the keys {', '.join(VERBS)}", keys,
                      "" if verbs else nearest(keys, list(VERBS)).removeprefix("; "))
            return None
        step, problems = find_problems(VERBS[verbs[0]], entry)
        for one in problems:
            self._add((*here, *one.key.split(".")), one.rule, one.value, one.way_out)
        if step is None:
            return None
        said = list(step.problems(self._said.prompts))
        for part, rule in said:
            self._add((*here, *part.split(".")), rule)
        return None if said else step

    def _values(self, known: Sequence[str], inside: Sequence[str]) -> dict[str, Any]:
        said = self._said
        values = {"record": self._value(said.record, ("record",), inside),
                  "group": self._value(said.group, ("group",), inside),
                  "makes": self._value(said.makes, ("makes",), known)}
        if said.makes not in KINDS and "{" not in said.makes:
            self._add(("makes",), f"must be one of {', '.join(KINDS)}, or a template of a setting",
                      said.makes)
        if said.together:
            among = [*inside, "kept", "num_parts"]
            for part in ("when", "least", "record", "note"):
                values[f"together.{part}"] = self._value(getattr(said.together, part), ("together", part),
                                                         among)
        return values

    def _value(self, raw: Any, place: tuple[str | int, ...], known: Sequence[str]) -> Any:
        try:
            value = compile_value(raw)
        except BadValue as e:
            self._add(place, str(e))
            return None
        for said in unknown_names(value, known):
            self._add(place, said)
        return value

    def _prompts(self, stem: str) -> dict[str, str]:
        """Return the texts of the templates, by their names."""
        texts = {}
        for name, prompt in self._said.prompts.items():
            system = f"{{% block system %}}\n{prompt.system}\n{{% endblock %}}\n" if prompt.system else ""
            texts[f"{stem}/{name}"] = (f"{{# version: {self._said.version} #}}\n{system}"
                                       f"{{% block user %}}\n{prompt.user}\n{{% endblock %}}\n")
            if name not in self._asked:
                self._add(("prompts", name), "is asked by no step", way_out="add a step, or remove it")
                continue
            try:
                parse_prompt(texts[f"{stem}/{name}"], name, "prompt", sorted(self._asked[name]), exact=False,
                             environment=ENVIRONMENT)
            except UserError as e:
                self._add(("prompts", name), " ".join(str(e).split()))
        return texts


class DeclaredGenerator(Generator):
    """Makes samples as a file says."""

    file: ClassVar[CompiledFile]
    texts: ClassVar[Mapping[str, str]]
    """Template -> its text."""

    @classmethod
    def prompts(cls, folders: Sequence[Path] = ()) -> dict[str, PromptTemplate]:
        return load_prompts(cls.templates, [*folders, PROMPTS], cls.texts, ENVIRONMENT)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._settings = {one.name: getattr(settings, one.name) for one in fields_of_class(settings)}
        kind = fill(self.file.values["makes"], self._settings)
        for name, paths in self._file_settings():
            if missing := [path for path in paths if not path.exists()]:
                raise SettingsError(f"generator {self.name}", [SettingsProblem(
                    ProblemCode.FILE, name, "does not exist", missing[0], "check the path")])
        if kind not in KINDS:
            raise UserError(f"{self.file.stem}: makes = {kind!r} must be one of {', '.join(KINDS)}")
        self.kind: Kind = kind

    def files(self) -> Sequence[Path]:
        return [*self.file.reader.files(), *(file for _, paths in self._file_settings()
                                             for file in benchmark_files(paths))]

    def _file_settings(self) -> Iterator[tuple[str, list[Path]]]:
        for name, setting in self.file.said.settings.items():
            if setting.files:
                yield name, list(map(Path, self._settings[name]))

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the reader's items; raises UserError as it does."""
        return self.file.reader.items(inputs, self.settings)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Run the steps on one item."""
        prepared = self.file.reader.prepare(item, self.settings)
        if isinstance(prepared, GeneratedSample):
            yield prepared
            return
        draft = Draft({**self._settings, **prepared, "item_id": item.id, "before": [], "part": 0})
        yield from self._from(0, draft, ask, [])

    def _from(self, place: int, draft: Draft, ask: Ask, kept: list[Draft]) -> Iterator[GeneratedSample]:
        """Run the steps from a place on; a draft that is kept is added to `kept`."""
        for number, step in enumerate(self.file.steps[place:], place + 1):
            parts = step.run(draft, ask, self.file.stem)
            if draft.has_failed:
                break
            if parts is not None:
                siblings: list[Draft] = []
                for part in parts:
                    part.fields["before"] = [one.fields for one in siblings]
                    yield from self._from(number, part, ask, siblings)
                kept += siblings
                if self._is_together(draft):
                    yield self._joined(draft, siblings, len(parts))
                return
        if not draft.has_failed:
            kept.append(draft)
        if draft.has_failed or not self._is_together(draft):
            yield from self._samples(draft, ask)

    def _is_together(self, draft: Draft) -> bool:
        return self.file.said.together is not None and bool(
            fill(self.file.values["together.when"], draft.fields))

    def _joined(self, draft: Draft, kept: Sequence[Draft], num_parts: int) -> GeneratedSample:
        together, values = self.file.said.together, self.file.values
        assert together is not None
        fields = {**draft.fields, "kept": [{**one.fields, "notes": one.notes} for one in kept],
                  "num_parts": num_parts}
        draft.check(together.name, len(kept) >= fill(values["together.least"], fields),
                    f"{len(kept)} of {num_parts} are kept")
        return GeneratedSample(fill(values["together.record"], fields), tuple(draft.verdicts),
                               self._group(draft), fill(values["together.note"], fields))

    def _samples(self, draft: Draft, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the sample of a draft, and those beside it."""
        values, group = self.file.values, self._group(draft)
        record = fill_known(self._record(values["record"]), draft.fields)
        if draft.unread:
            record["text"] = draft.unread
        yield GeneratedSample(record, tuple(draft.verdicts), group, dict(draft.notes))
        for place, one in enumerate(self.file.said.beside):
            if draft.has_failed or not fill(values[f"beside.{place}.when"], draft.fields):
                continue
            other = draft.part({})
            for step in self.file.beside[place]:
                step.run(other, ask, self.file.stem)
                if other.has_failed:
                    break
            yield GeneratedSample(fill_known(values[f"beside.{place}.record"], other.fields),
                                  tuple(other.verdicts), group, {}, one.makes)

    def _record(self, value: Mapping[str, Any]) -> Any:
        # a record of each kind where a setting chooses between kinds
        return value[self.kind] if self.file.said.makes not in KINDS else value

    def _group(self, draft: Draft) -> str:
        value = self.file.values["group"]
        return str(value(draft.fields)) if value.names <= draft.fields.keys() else ""
