"""RECIPE or --config, --plugin, --set: what all commands that start from a recipe share.  No torch here.

Here, and nowhere else, stands which code is run: what the command line names, and what code so named says
itself.  A config file is data; what it names is looked up among what is known already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from megatron_sov.base.errors import UserError, download, nearest
from megatron_sov.base.plugins.loading import is_reference, load
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.base.settings import (
    Flag, Place, ProblemCode, SettingsError, SettingsProblem, fields_of, find_inert, hint_below, read_located,
    read_text, value_at)
from megatron_sov.base.settings.options import field_texts
from megatron_sov.base.settings.problem import show
from megatron_sov.model import objectives, recipes
from megatron_sov.model.config import (
    ModelConfig, RunConfig, apply_settings, correct_setting, from_dict, is_setting, setting_names)
from megatron_sov.model.config.learning import BUILT_IN
from megatron_sov.model.config.run import iter_settings
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import Family
from megatron_sov.model.recipes.stage_defaults import base_of_model

BuiltIn = Literal["lm", "sft", "preference", "distill", "policy"]
"""Objectives that come with the framework (`objectives.BUILT_IN`)."""
NAMED_BY_SETTINGS: dict[str, Registry] = {"model.family": models.OWN, "objective.name": objectives.OWN}
"""Settings whose value may be code: FILE.py:NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Code of the user's own."""

    plugins: Annotated[tuple[str, ...], Flag("--plugin", "FILE.py:NAME")] = ()
    """Run this file of yours, for a model family or objective that a checkpoint or --config has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions(PluginOptions):
    """What is trained, and how."""

    recipe: Annotated[str | None, Flag("RECIPE")] = None
    """Name of a recipe (`megatron-sov recipes` lists them), or FILE.py:FUNCTION of your own; sft, prefer,
    distill and rl need none: the model is that of --from."""
    configs: Annotated[tuple[Path, ...], Flag("--config", "FILE")] = ()
    """Settings from a YAML or JSON file: a part of them over RECIPE, or over the recipe that the file names,
    or all of them, as a run's config.json has them; may be repeated, later files win."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Change a setting, e.g. --set train.steps=100 --set parallel.ep=2."""
    groups: ClassVar[tuple[str, ...]] = ()
    """Groups of settings that the command is about: of several of one name theirs is meant."""

    @classmethod
    def find_setting(cls, word: str) -> str:
        """Return the setting that an unknown option, or the key of a --set, may mean; "": none is known."""
        return correct_setting(word, cls.groups)

    is_setting = staticmethod(is_setting)

    @staticmethod
    def setting_texts() -> dict[str, str]:
        """Return setting -> its help, of items of lists those of the first."""
        return {name: field_texts(cls).get(name.rpartition(".")[2], "")
                for name, cls, has_settings in iter_settings(RunConfig) if not has_settings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions):
    """What is trained, on which data."""

    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR|FILE[:weight]")] = ()
    """Token shards made by `sov-data pack`, or a file of chats, pairs or text (.jsonl, .json, .parquet,
    .txt), which is packed into RUN/data with the tokenizer of --from; several are mixed by weight, and NAME
    renames their sources (needed, unless --config names them)."""
    deterministic: bool = False
    """The same bits in every run (--set train.deterministic=true)."""


def load_plugins(references: Sequence[str]) -> None:
    """Run the files that --plugin names; from then on their families and objectives are known by name.

    Raises:
        UserError: a file cannot be run, or what it names is neither.
    """
    for reference in references:
        loaded = load(reference)
        (models.OWN if isinstance(loaded.value, Family) else objectives.OWN).add(loaded)


@dataclasses.dataclass(frozen=True)
class RecipeRequest:
    """What a command was asked for."""

    base: RunConfig
    """The recipe's settings, or those of --config."""
    settings: tuple[str, ...]
    """--set, with names in place of files."""
    from_file: bool
    """Whether it is --config."""
    of_model: bool = False
    """Whether it is neither: the model of --from, and what the stage takes by default."""
    trains_by: BuiltIn | None = None
    """Objective of a training command; None: any."""
    layered: frozenset[str] = frozenset()
    """Settings that files of --config name."""
    changed: frozenset[str] = frozenset()
    """Settings to which files of --config give another value than the recipe."""
    command: str = ""
    """Training command; "": any."""
    resumed: RunConfig | None = None
    """Settings of the run that is resumed; its values are no requests."""

    @property
    def said(self) -> frozenset[str]:
        """Keys that --set and files of --config name."""
        return self.layered | {setting.partition("=")[0] for setting in self.settings}

    def refuse_inert(self, config: RunConfig, **options: Any) -> None:
        """Refuse settings that were asked for and that no part of the run would read.

        Args:
            config: resolved settings.
            options: option that decides over settings -> its value; of `data` the formats of its sources.

        Raises:
            SettingsError: naming each with the setting that decides.
        """
        facts = {f"--{name}": value for name, value in options.items()}
        if self.command:
            facts["command"] = self.command
        asked = self.changed | {setting.partition("=")[0] for setting in self.settings}
        if self.resumed is not None:
            asked = frozenset(key for key in asked if value_at(config, key) != value_at(self.resumed, key))
        if problems := find_inert(config, sorted(asked), facts):
            raise SettingsError("", problems)

    def config(self, defaults: Sequence[str] = (), own: Sequence[str] = ()) -> RunConfig:
        """Return the resolved settings, with the code that they name on record.

        Args:
            defaults: settings that --set goes before.
            own: settings that go before --set.

        Raises:
            UserError: a setting does not exist or cannot act, a family or objective that nobody has named,
                or one of another command; or the length of the run is set twice.
        """
        # Later settings win.
        config = apply_settings(self.base, [*defaults, *self.settings, *own])
        models.get(config.model.family, config.code)
        objectives.check(config)
        if self.trains_by is not None:
            objectives.check_command(config, self.trains_by)
        self.refuse_inert(config)
        _refuse_two_lengths(config, self.said)
        used = [models.OWN.code(config.model.family), objectives.OWN.code(config.objective.name)]
        code = (*(c for c in config.code if c.kind == "recipe"), *(c for c in used if c is not None))
        return dataclasses.replace(config, code=code)


def requested(args: RecipeOptions, of_model: Callable[[], RunConfig] | None = None) -> RecipeRequest:
    """Return what the options ask for; runs the code that they name.

    Args:
        args: what was typed.
        of_model: gives the settings where neither RECIPE nor --config is named; None: one has to be.

    Raises:
        UserError: there is no recipe, or it, --config, --plugin or --set cannot be used.
    """
    # First: the recipe and the settings may name what these files declare.
    load_plugins(args.plugins)
    files = [_read_layer(path) for path in args.configs]
    settings = tuple(_named(setting) for setting in args.settings)
    named = [(file, str(file.value["recipe"])) for file in files if "recipe" in file.value]
    is_whole = bool(files) and _is_whole(files[0].value)
    is_of_model = args.recipe is None and not named and of_model is not None
    for file, name in named:
        first = args.recipe or named[0][1]
        if name != first:
            raise UserError(f"{file.where}: is for recipe {name}, not {first}; name one recipe")
    if of_model is not None and is_of_model:
        base = of_model()
    elif args.recipe is None and not named:
        if files:
            raise UserError(f"{files[0].where}: names no recipe; add a line `recipe: NAME` "
                            "(`megatron-sov recipes` lists them), or pass RECIPE too")
        raise UserError("RECIPE: is missing; name a recipe (`megatron-sov recipes` lists them), or pass "
                        "--config FILE with one in it")
    elif args.recipe is None and is_whole:
        base, files = _of_whole(files[0]), files[1:]
    else:
        if args.recipe is None and is_reference(named[0][1]):  # a file is data: it runs nothing
            raise UserError(f"{named[0][0].where}: recipe = {named[0][1]!r} is code; pass it as RECIPE")
        base = _of_recipe(args.recipe or named[0][1])
    recipe, from_file = base, args.recipe is None and is_whole
    for file in files:
        base = file.over(base)
    layered = frozenset(".".join(place) for file in files for place, _ in _leaves(RunConfig, file.value, ()))
    changed = {key for key in layered if value_at(base, key) != value_at(recipe, key)}
    if from_file:
        changed |= _changed_by_whole(recipe)
    return RecipeRequest(base, settings, from_file, of_model=is_of_model, layered=layered,
                         changed=frozenset(changed - {"recipe", "code"}))


DERIVED = ("recipe", "code", "data.phases", "train.steps", "train.tokens", "train.epochs")
"""Settings of a run's config.json that its command derives from others."""


def _changed_by_whole(config: RunConfig) -> set[str]:
    """Return the settings of a run's config.json that neither its recipe nor the defaults have."""
    of_model = base_of_model(config.recipe, config.model, config.train.precision, "sft")
    usual = (RunConfig(config.recipe, config.model),
             recipes.get(config.recipe) if config.recipe in recipes.names() else of_model)
    return {key for key in setting_names() if key not in DERIVED and not key.startswith("model.")
            and value_at(config, key) not in [value_at(other, key) for other in usual]}


LENGTHS = ("rollout.rounds", "train.epochs", "train.steps", "train.tokens")
"""Settings that say how long a run is; one goes before those behind it."""


def _refuse_two_lengths(config: RunConfig, said: Collection[str]) -> None:
    """Refuse a length of the run that another setting overrules."""
    lengths = [key for key in LENGTHS if key in said and value_at(config, key)]
    budgets = [f"data.phases.{i}.tokens" for i, phase in enumerate(config.data.phases)
               if phase.tokens and {"data.phases", f"data.phases.{i}.tokens"} & set(said)]
    if "train.tokens" in lengths:
        lengths[-1:] = [*budgets[:1], "train.tokens"]
    if len(lengths) > 1:
        winner, *others = lengths
        raise SettingsError("", [SettingsProblem(
            ProblemCode.INERT, others[0], f"has no effect with {winner} = {show(value_at(config, winner))}: "
            "both say how long the run is", value_at(config, others[0]), "set one of them")])


def training_request(args: TrainingOptions, objective: BuiltIn, *, needs_data: bool = True,
                     lengthens: bool = False, of_model: Callable[[], RunConfig] | None = None,
                     resumed: RunConfig | None = None) -> RecipeRequest:
    """Return what a training command was asked for; neither its data nor its checkpoint need be there.

    Args:
        args: what was typed.
        objective: what the command trains by; objectives of your own go by commands that train by "lm".
        needs_data: whether data must be named.
        lengthens: whether the command lengthens contexts: a recipe with stages for that says in its objective
            what is trained behind them.
        of_model: as of `requested`.
        resumed: settings of the run that is resumed.

    Raises:
        UserError: as `requested`, or no data is named.
    """
    asked = requested(args, of_model)
    if needs_data and not args.data and not asked.base.data.paths:
        raise UserError("--data: is missing; pass a file of chats, pairs or text, or a folder made by "
                        "`sov-data pack`")
    learned = asked.base.objective
    before = lengthens and asked.base.extend.stages and not asked.from_file
    if learned.name == "lm" or before:  # "lm" is what every recipe says that leaves it open
        learned = dataclasses.replace(learned, name=objective)
    flags = ("train.deterministic=true",) if args.deterministic else ()
    return dataclasses.replace(asked, base=dataclasses.replace(asked.base, objective=learned),
                               settings=(*asked.settings, *flags), trains_by=objective,
                               command="extend" if lengthens else BUILT_IN[objective],
                               resumed=resumed)


def _of_recipe(recipe: str) -> RunConfig:
    if "=" in recipe and not is_reference(recipe):
        raise UserError(f"{recipe}: stands where the recipe does; write --set {shlex.quote(recipe)}, and "
                        "name a recipe (`megatron-sov recipes` lists them)")
    if download(recipe) and ":" not in recipe:
        close = nearest(recipe.rpartition("/")[2].lower(), recipes.names())
        raise UserError(f"{recipe}: is a model's name on the Hugging Face hub, and no recipe{close} "
                        "(`megatron-sov recipes` lists them); weights are named by --from HF_DIR")
    name = recipes.OWN.load(recipe) if is_reference(recipe) else recipe
    config, code = recipes.get(name), recipes.OWN.code(name)
    if code is None:
        return config
    # what the command line names may name more: families and objectives beside it,
    # by paths from its own folder
    names = {}
    for setting, registry in NAMED_BY_SETTINGS.items():
        part, _, field = setting.partition(".")
        value = str(getattr(getattr(config, part), field))
        if is_reference(value):
            is_file = value.rpartition(":")[0].endswith(".py")
            names[setting] = registry.load(os.path.join(os.path.dirname(code.reference), value)
                                           if is_file else value)
    config = apply_settings(config, [f"{setting}={name}" for setting, name in names.items()])
    return dataclasses.replace(config, code=(code,))


@dataclasses.dataclass(frozen=True)
class ConfigLayer:
    """What a --config file says, which is data from wherever it comes."""

    where: str
    value: dict[str, Any]
    lines: Mapping[Place, int]

    def over(self, base: RunConfig) -> RunConfig:
        """Return settings with those of the file in their places.

        Raises:
            SettingsError: all that is wrong with them, with its line.
        """
        changes = {".".join(place): value for place, value in _leaves(RunConfig, self.value, ())}
        changes.pop("recipe", None)
        try:
            return apply_settings(base, [f"{key}={json.dumps(value)}" for key, value in changes.items()],
                                  self.where)
        except SettingsError as e:
            raise SettingsError(self.where, [dataclasses.replace(problem, line=self.line_of(problem.key))
                                             for problem in e.problems]) from None

    def line_of(self, key: str) -> int:
        place: Place = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 0)


def _read_layer(path: Path) -> ConfigLayer:
    where = f"--config {path}"
    if path.is_dir():
        raise UserError(f"{where}: is a folder; pass a file, such as the config.json in it")
    located = read_located(read_text(path, where))
    problems = located.problems
    if not problems and not isinstance(located.value, dict):
        problems = [SettingsProblem(ProblemCode.TYPE, "", "must be an object of settings", located.value)]
    if problems:
        raise SettingsError(where, problems)
    return ConfigLayer(where, located.value, located.lines)


def _is_whole(value: Mapping[str, Any]) -> bool:
    """Return whether a file says all that a run needs, as its config.json does: an architecture above all."""
    model = value.get("model")
    needed = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING
              and f.default_factory is dataclasses.MISSING]
    return isinstance(model, dict) and all(name in model for name in needed)


def _of_whole(file: ConfigLayer) -> RunConfig:
    try:
        return from_dict(file.value)
    except UserError as e:
        raise UserError(f"{file.where}: {e}") from None


def _leaves(cls: Any, value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the place and the value of each setting of a file: what a class of settings holds is walked
    through, and a list or a table of names is one value."""
    if not dataclasses.is_dataclass(cls) or not isinstance(value, dict):
        yield place, value
        return
    for key, inner in value.items():
        hint = hint_below(cls, key) if key in fields_of(cast(Any, cls)) else None
        yield from _leaves(hint, inner, (*place, key))


def _named(setting: str) -> str:
    """Return a setting with a name in place of the file that it names, which is run."""
    key, _, value = setting.partition("=")
    registry, value = NAMED_BY_SETTINGS.get(key), value.strip('"')
    return f"{key}={registry.load(value)}" if registry is not None and is_reference(value) else setting

