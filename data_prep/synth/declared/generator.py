"""Compile YAML files into generators of synthetic samples: item reader, prompts, steps and record.

The whole file is checked when it is read. Unknown keys, parsers and fields, templates that access Python
internals, and settings with invalid defaults are refused before any request.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields as list_fields, make_dataclass, replace
from functools import lru_cache
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Le, MinLen

from data_prep.synth.declared.steps import VERBS, Draft, EveryStep, GeneratorStep
from data_prep.synth.declared.templates import (
    PROMPTS, BadTemplate, Prompt, PromptTemplate, add_functions, collect_field_names, compile_value,
    compute_record, find_unknown_names)
from data_prep.synth.functions.registry import FUNCTIONS
from data_prep.synth.readers.registry import READERS, Reader, RecordOptions
from data_prep.synth.requests import Requester
from data_prep.synth.samples import KINDS, GeneratedSample, GeneratorItem, Kind
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.settings import (
    UNIQUE_ITEMS, LocatedDocument, NotBlank, ProblemCode, SettingsError, SettingsProblem, at_most_field,
    parse_located_yaml, parse_settings, read_settings_text, try_parse_settings)
from megatron_sov.base.settings.options import get_field_help
from megatron_sov.base.settings.problem import UNSET

PACKAGED = {file.stem: file for file in sorted((Path(__file__).parents[1] / "generators").glob("*.yaml"))}
"""Packaged generators: name -> file."""
SUFFIXES = (".yaml", ".yml")
ITEM_FIELDS = ("item_id", "part")
"""Fields in every sample: item id, and index among the parts from a reply or list."""
Place = tuple[str | int, ...]
"""Path of keys and indices in the file."""
add_functions(FUNCTIONS)


@dataclass(frozen=True)
class DeclaredSetting:
    """Entry in `settings`."""

    default: bool | int | float | str | tuple[str, ...]
    help: str = ""
    """One line for `sov-data synth NAME --list`."""
    min: float | None = None
    max: float | None = None
    options: tuple[str, ...] = ()
    """Accepted values, for each item in a list setting; empty: no restriction."""
    at_most: str = ""
    """Setting that limits this setting from above."""

    def build_type(self) -> Any:
        """Return the annotated type for a settings dataclass."""
        text_type: Any = Literal[self.options] if self.options else str
        hint: Any = type(self.default)
        rules: list[Any] = []
        if isinstance(self.default, str):
            hint = text_type
        elif isinstance(self.default, tuple):
            hint = tuple[text_type, ...]
            rules.append(UNIQUE_ITEMS)
            if self.options:
                rules.append(MinLen(1))
        if self.min is not None:
            rules.append(Ge(self.min))
        if self.max is not None:
            rules.append(Le(self.max))
        if self.at_most:
            rules.append(at_most_field(self.at_most))
        return Annotated[(hint, *rules)] if rules else hint


@dataclass(frozen=True)
class GeneratorFile:
    """Content of a generator file, not yet compiled."""

    help: NotBlank
    """One line for `sov-data synth --list`."""
    items: str | dict[str, dict[str, Any]]
    """Reader name in `READERS`, or `records` with options."""
    prompts: dict[str, Prompt]
    steps: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    record: dict[str, Any]
    """Field -> value; or kind -> record, if `makes` names a setting."""
    makes: str = "text"
    """Record kind (`KINDS`), or a setting that holds the kind."""
    settings: dict[str, DeclaredSetting] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    """Python modules that may be missing from an installation."""


@dataclass(frozen=True)
class GeneratorDefinition:
    """A compiled generator file."""

    name: str
    """File name without suffix."""
    declared: GeneratorFile
    reader: Reader
    steps: Sequence[GeneratorStep]
    record: Any
    """Compiled `record`."""
    prompts: Mapping[str, PromptTemplate]
    Settings: type[Any]
    """Frozen dataclass with settings from reader and file."""
    setting_help: Mapping[str, str]
    digest: str
    """SHA-256 over the file."""

    @property
    def libraries(self) -> Sequence[str]:
        return ("py3langid", *self.declared.libraries)


class Generator:
    """A generator with its settings.

    `make_samples` keeps no state: after a kill it starts again, and `answers.sqlite` answers repeated
    requests.
    """

    def __init__(self, definition: GeneratorDefinition, settings: Any) -> None:
        """Raises `UserError`: the setting that holds the kind has no record in the file."""
        self.definition, self.settings, self.name = definition, settings, definition.name
        self._setting_values = {setting.name: getattr(settings, setting.name)
                                for setting in list_fields(settings)}
        makes, self._record = definition.declared.makes, definition.record
        self.kind: Kind = makes if makes in KINDS else self._setting_values[makes]
        if makes not in KINDS:
            if self.kind not in KINDS or self.kind not in definition.declared.record:
                raise UserError(f"{self.name}: {makes} = {self.kind!r} must be one of "
                                f"{', '.join(KINDS)} and have a record in the generator's file")
            self._record = self._record[self.kind]

    def list_files(self) -> Sequence[Path]:
        """Return additional input files, such as `constraints` for `autoif`."""
        return self.definition.reader.list_files(self.settings)

    def read_items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield items in input order; raises `UserError` with file and line for a bad record."""
        return self.definition.reader.read_items(inputs, self.settings)

    def make_samples(self, item: GeneratorItem, requester: Requester) -> Iterator[GeneratedSample]:
        """Run the steps on an item and yield accepted and failed samples."""
        fields = {**self._setting_values, **self.definition.reader.prepare_fields(item, self.settings),
                  "item_id": item.id, "part": 0}
        yield from self._run_steps(self.definition.steps, Draft(fields), requester)

    def _run_steps(self, steps: Sequence[GeneratorStep], draft: Draft, requester: Requester
                   ) -> Iterator[GeneratedSample]:
        """Run steps on a draft; if a step divides it, run the remaining steps on each part."""
        for number, step in enumerate(steps, 1):
            parts = step.run_step(draft, requester)
            if draft.has_failed:
                break
            if parts is not None:
                for part in parts:
                    yield from self._run_steps(steps[number:], part, requester)
                return
        record = compute_record(self._record, draft.fields)
        if draft.unparsed_reply:
            record = {**record, "text": draft.unparsed_reply}
        yield GeneratedSample(record, tuple(draft.verdicts), dict(draft.notes))


def load_generator(name: str) -> GeneratorDefinition:
    """Load a packaged generator by name, or a generator file; raises `UserError`."""
    if name.endswith(SUFFIXES):
        return read_generator(Path(name))
    if name in PACKAGED:
        return _read_packaged_generator(name)
    hint = suggest_successor(name) or suggest_name(name, PACKAGED)
    raise UserError(f"{name}: is no generator{hint}; known are {', '.join(PACKAGED)}, and files "
                    f"that end with {' or '.join(SUFFIXES)}")


@lru_cache(maxsize=len(PACKAGED))
def _read_packaged_generator(name: str) -> GeneratorDefinition:
    return read_generator(PACKAGED[name])


def read_generator(file: Path) -> GeneratorDefinition:
    """Read and compile a generator file; raises `SettingsError` with each problem's line."""
    text = read_settings_text(file)
    located = parse_located_yaml(text)
    if located.problems:
        raise SettingsError(str(file), located.problems)
    declared = parse_settings(
        GeneratorFile, located.value or {}, str(file), lines=located.lines,
        instead=lambda key: suggest_successor(f"generator file.{key}").removeprefix("; "))
    return _Compiler(file, located, declared).compile_file(hashlib.sha256(text.encode()).hexdigest())


class _Compiler:
    def __init__(self, file: Path, located: LocatedDocument, declared: GeneratorFile) -> None:
        self._file, self._located, self._declared = file, located, declared
        self._problems: list[SettingsProblem] = []
        self._step_problems: list[tuple[Place, str]] = []
        """Problems in templates and names. Reported only if every step has a valid form: a later step may
        read the fields that an invalid step sets."""
        self._prompt_fields: dict[str, set[str]] = {}
        """Prompt -> fields available in every step that sends the prompt."""

    def compile_file(self, digest: str) -> GeneratorDefinition:
        declared, name = self._declared, self._file.stem
        reader = self._compile_reader()
        reserved = {"self", *ITEM_FIELDS, *reader.fields, *PROMPTS.globals}
        for setting in declared.settings:
            if (not setting.isidentifier() or iskeyword(setting) or setting.startswith("_")
                    or setting in reserved):
                self._add_problem(("settings", setting), "is no name for a setting, or is taken", setting,
                                  "choose another one")
        self._check_function_names(("items",), reader.fields)
        self._raise_problems()
        settings = self._compile_settings(reader)
        setting_names = [setting.name for setting in list_fields(settings)]
        steps, names = self._compile_steps(declared.steps, ("steps",),
                                           [*ITEM_FIELDS, *setting_names, *reader.fields])
        self._raise_problems()
        for place, rule in self._step_problems:
            self._add_problem(place, rule)
        record = self._compile_record(names)
        if declared.makes not in (*KINDS, *setting_names):
            self._add_problem(("makes",), f"must be one of {', '.join(KINDS)}, or a setting", declared.makes)
        prompts = self._compile_prompts()
        self._raise_problems()
        declared_help = {key: setting.help for key, setting in declared.settings.items() if setting.help}
        return GeneratorDefinition(name, declared, reader, steps, record, prompts, settings,
                                   {**get_field_help(reader.Settings), **declared_help}, digest)

    def _raise_problems(self) -> None:
        if self._problems:
            raise SettingsError(str(self._file), self._problems)

    def _add_problem(self, place: Place, rule: str, value: Any = UNSET, way_out: str = "") -> None:
        self._problems.append(SettingsProblem(ProblemCode.RULE, ".".join(map(str, place)), rule, value,
                                              way_out, line=self._located.line(place)))

    def _add_problems(self, place: Place, problems: Sequence[SettingsProblem]) -> None:
        for problem in problems:
            self._add_problem((*place, *problem.key.split(".")), problem.rule, problem.value, problem.way_out)

    def _check_function_names(self, place: Place, names: Sequence[str]) -> None:
        for name in names:
            if name in PROMPTS.globals:
                self._add_problem(place, "is the name of a function, and of no field", name,
                                  "rename the field")

    def _compile_reader(self) -> Reader:
        items = self._declared.items
        if isinstance(items, str) and items in READERS:
            return READERS[items]
        options: RecordOptions | None = None
        if not isinstance(items, str) and set(items) == {"records"}:
            options, problems = try_parse_settings(RecordOptions, items["records"])
            self._add_problems(("items", "records"), problems)
        else:
            suggestion = suggest_name(items, list(READERS)) if isinstance(items, str) else ""
            self._add_problem(
                ("items",), f"must be {', '.join(READERS)} or {{records: {{fields: [...]}}}}{suggestion}",
                items)
        self._raise_problems()
        assert options is not None  # otherwise a problem was raised
        if options.times and options.times not in self._declared.settings:
            self._add_problem(("items", "records", "times"), "names no setting", options.times,
                              "name one of the file")
        return options.build_reader(self._file.parent)

    def _compile_settings(self, reader: Reader) -> type[Any]:
        """Build a settings dataclass; defaults in the file override the reader's defaults."""
        hints = get_type_hints(reader.Settings, include_extras=True)
        declared_fields: list[tuple[str, Any, Any]] = []
        for name, setting in self._declared.settings.items():
            if setting.at_most and setting.at_most not in {*self._declared.settings, *hints}:
                self._add_problem(("settings", name), "names no setting", setting.at_most,
                                  "name another one of the file")
            hint = hints.get(name) or setting.build_type()
            declared_fields.append((name, hint, field(default=setting.default)))
        self._raise_problems()
        settings = make_dataclass("Settings", declared_fields, bases=(reader.Settings,), frozen=True)
        defaults = {name: setting.default for name, setting in self._declared.settings.items()}
        _, problems = try_parse_settings(settings, defaults)
        for problem in problems:
            self._add_problem(("settings", problem.key.split(".")[0], "default"), problem.rule, problem.value,
                              problem.way_out)
        return settings

    def _compile_steps(self, entries: Sequence[Mapping[str, Any]], place: Place, names: Sequence[str]
                       ) -> tuple[tuple[GeneratorStep, ...], list[str]]:
        """Return the compiled steps and the fields known after the last step."""
        compiled_steps: list[GeneratorStep] = []
        names = list(names)
        for number, entry in enumerate(entries):
            step_place = (*place, number)
            step = self._parse_step(entry, step_place)
            if step is None:
                continue
            names_after = [*names, *step.list_set_fields()]
            if isinstance(step, EveryStep):
                inner, names_after = self._compile_steps(step.do, (*step_place, "do"), names_after)
                step = replace(step, do=inner)  # type: ignore[arg-type]
            compiled, problems = step.compile_parts(names)
            self._step_problems += [((*step_place, part), rule) for part, rule in problems]
            prompt = getattr(step, "ask", "") or getattr(step, "user", "")
            if prompt:
                self._prompt_fields[prompt] = self._prompt_fields.get(prompt, set(names)) & set(names)
            names = names_after
            compiled_steps.append(compiled)
        return tuple(compiled_steps), names

    def _parse_step(self, entry: Mapping[str, Any], place: Place) -> GeneratorStep | None:
        """Return a step with valid form; otherwise add its problems."""
        verbs = [name for name in VERBS if name in entry]
        if len(verbs) != 1:
            keys = ", ".join(map(str, entry))
            self._add_problem(place, f"must have one of the keys {', '.join(VERBS)}", keys,
                              "" if verbs else suggest_name(keys, list(VERBS)).removeprefix("; "))
            return None
        step, problems = try_parse_settings(VERBS[verbs[0]], entry)
        self._add_problems(place, problems)
        rules = list(step.find_problems(self._declared.prompts)) if step else []
        for part, rule in rules:
            self._add_problem((*place, part), rule)
        if step is None or rules:
            return None
        self._check_function_names((*place, verbs[0]), step.list_set_fields())
        if step.divides_sample and place[:-1] != ("steps",):
            self._add_problem(place, "would divide the sample, which steps of `every` may not",
                              way_out="move it to `steps`")
        return step

    def _compile_record(self, names: Sequence[str]) -> Any:
        try:
            record = compile_value(self._declared.record)
        except BadTemplate as e:
            self._add_problem(("record",), str(e))
            return None
        for problem in find_unknown_names(collect_field_names(record), names):
            self._add_problem(("record",), problem)
        return record

    def _compile_prompts(self) -> dict[str, PromptTemplate]:
        templates = {}
        for name, prompt in self._declared.prompts.items():
            if name not in self._prompt_fields:
                self._add_problem(("prompts", name), "is asked by no step",
                                  way_out="add a step, or remove it")
                continue
            try:
                template = PromptTemplate.from_prompt(f"{self._file.stem}/{name}", prompt)
            except BadTemplate as e:
                self._add_problem(("prompts", name), str(e))
                continue
            for problem in find_unknown_names(template.field_names, self._prompt_fields[name]):
                self._add_problem(("prompts", name), problem)
            templates[name] = template
        return templates
