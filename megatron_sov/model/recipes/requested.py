"""Options RECIPE, --config, --plugin and --set of all commands that start from a recipe (no torch).

This module alone decides which user code runs: code named on the command line, and code named by that code. A
--config file is data; names in it are only looked up among registered plug-ins.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from megatron_sov.base.errors import Fix, UserError, suggest_download
from megatron_sov.base.hints.paths import list_data
from megatron_sov.base.plugins.loading import is_reference, load_plugin
from megatron_sov.base.plugins.registry import Registry, suggest_same_family
from megatron_sov.base.settings import (
    Flag, Place, ProblemCode, SettingsError, SettingsProblem, find_inert_settings, get_inner_hint,
    get_setting, list_fields, parse_located_yaml, read_settings_text, split_key)
from megatron_sov.base.settings.problem import format_setting
from megatron_sov.model import objectives, recipes
from megatron_sov.model.config import (
    ModelConfig, RunConfig, apply_settings, correct_setting, from_dict, is_setting, setting_names)
from megatron_sov.model.config.learning import BUILT_IN
from megatron_sov.model.config.run import iter_settings
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import Family
from megatron_sov.model.recipes.stage_defaults import LENGTHS, build_base_config

BuiltIn = Literal["lm", "sft", "preference", "distill", "policy"]
"""Built-in objectives (`objectives.BUILT_IN`)."""
NAMED_BY_SETTINGS: dict[str, Registry] = {"model.family": models.FAMILY_PLUGINS,
                                          "objective.name": objectives.OBJECTIVE_PLUGINS}
"""Settings whose value may be code, FILE.py:NAME -> registry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Your own code."""

    plugins: Annotated[tuple[str, ...], Flag("--plugin", "FILE.py:NAME")] = ()
    """Run your Python file, for a model family or objective named in a checkpoint or --config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions(PluginOptions):
    """Recipe and settings."""

    recipe: Annotated[str | None, Flag("RECIPE")] = None
    """Recipe name (`megatron-sov recipes` lists all), or your own FILE.py:FUNCTION. Optional for sft, prefer,
    distill and rl: they take the model from --from."""
    configs: Annotated[tuple[Path, ...], Flag("--config", "FILE")] = ()
    """YAML or JSON file with settings: some settings, applied to RECIPE or to the recipe named in the file,
    or all settings, such as a run's config.json. Repeat the option for more files; later files win."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Change a setting, e.g. --set train.steps=100 --set parallel.ep=2."""
    groups: ClassVar[tuple[str, ...]] = ()
    """Groups of settings preferred when a name exists in several groups."""

    @classmethod
    def find_setting(cls, word: str) -> str:
        """Return the setting that an unknown option or --set key may mean; "" without a match."""
        return correct_setting(word, cls.groups)

    is_setting = staticmethod(is_setting)

    @staticmethod
    def list_settings() -> list[str]:
        """Return the names of all settings; for list items, settings of item 0."""
        return [name for name, _, has_settings in iter_settings(RunConfig) if not has_settings]

    @staticmethod
    def is_recipe(word: str) -> bool:
        return word in recipes.names()

    @staticmethod
    def find_recipe(model: str) -> str:
        """Return the recipe of a model on the Hugging Face hub, OWNER/NAME; "": none."""
        return _find_released(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions):
    """Recipe, settings and training data."""

    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR|FILE[:weight]")] = ()
    """Token shards from `sov-data pack`, or a file with chats, pairs or text (.jsonl, .json, .parquet, .txt),
    packed into RUN/data with --from's tokenizer. Repeat the option to mix data by weight. NAME renames the
    sources."""
    deterministic: bool = False
    """Produce identical bits in every run (--set train.deterministic=true)."""


def load_plugins(references: Sequence[str]) -> None:
    """Run the files named by --plugin and register their families and objectives. Raises `UserError`: a file
    fails, or names neither a family nor an objective."""
    for reference in references:
        loaded = load_plugin(reference)
        is_family = isinstance(loaded.value, Family)
        registry = models.FAMILY_PLUGINS if is_family else objectives.OBJECTIVE_PLUGINS
        registry.add(loaded)


@dataclasses.dataclass(frozen=True)
class RecipeRequest:
    """Settings requested on the command line, before they are resolved."""

    base: RunConfig
    """Settings from the recipe or from --config."""
    settings: tuple[str, ...]
    """--set values, with code replaced by registered names."""
    from_file: bool
    """Whether `base` is a complete --config file."""
    is_model_only: bool = False
    """Whether `base` is the model of --from with stage defaults (no recipe)."""
    trains_by: BuiltIn | None = None
    """A training command's objective; None for other commands."""
    layered: frozenset[str] = frozenset()
    """Settings named in --config files."""
    changed: frozenset[str] = frozenset()
    """Settings whose value in --config files differs from the recipe."""
    command: str = ""
    """Training command; "" for other commands."""
    resumed: RunConfig | None = None
    """Settings of a resumed run; repeating its values is not a request."""

    @property
    def requested_keys(self) -> frozenset[str]:
        """Keys named by --set and --config files."""
        return self.layered | {setting.partition("=")[0] for setting in self.settings}

    def refuse_inert(self, config: RunConfig, **options: Any) -> None:
        """Reject requested settings that no part of the run reads.

        Args:
            config: resolved settings.
            options: option name -> value, for options that decide whether settings act; `data` gives source
                formats.

        Raises:
            SettingsError: for each inert setting, with the deciding setting.
        """
        facts = {f"--{name}": value for name, value in options.items()}
        if self.command:
            facts["command"] = self.command
        requested_keys = self.changed | {setting.partition("=")[0] for setting in self.settings}
        if self.resumed is not None:
            requested_keys = frozenset(key for key in requested_keys
                                       if get_setting(config, key) != get_setting(self.resumed, key))
        if problems := find_inert_settings(config, sorted(requested_keys), facts):
            raise SettingsError("", problems)

    def config(self, defaults: Sequence[str] = (), own: Sequence[str] = ()) -> RunConfig:
        """Return the resolved settings, and record the code they name. `defaults`: settings that --set
        overrides; `own`: settings that override --set. Raises `UserError`: unknown or inert settings, an
        unknown family or objective, another command's objective, or two settings for the run's length."""
        # Later settings win.
        config = apply_settings(self.base, [*defaults, *self.settings, *own])
        models.get_family(config.model.family, config.code)
        objectives.check_objective(config)
        if self.trains_by is not None:
            objectives.check_command(config, self.trains_by)
        self.refuse_inert(config)
        _refuse_two_lengths(config, self.requested_keys)
        used_code = [models.FAMILY_PLUGINS.code(config.model.family),
                     objectives.OBJECTIVE_PLUGINS.code(config.objective.name)]
        code = (*(c for c in config.code if c.kind == "recipe"), *(c for c in used_code if c is not None))
        return dataclasses.replace(config, code=code)


def request_recipe(args: RecipeOptions, of_model: Callable[[], RunConfig] | None = None) -> RecipeRequest:
    """Return the settings requested by options; runs the code they name.

    Args:
        args: parsed options.
        of_model: returns the settings if neither RECIPE nor --config is given; None: a recipe is required.

    Raises:
        UserError: no recipe, or an unusable recipe, --config, --plugin or --set.
    """
    # Load plug-ins first: recipe and settings may name their families and objectives.
    load_plugins(args.plugins)
    files = [_read_layer(path) for path in args.configs]
    settings = tuple(_register_code(setting) for setting in args.settings)
    recipe_names = [(file, str(file.value["recipe"])) for file in files if "recipe" in file.value]
    is_complete = bool(files) and _is_whole_config(files[0].value)
    is_of_model = args.recipe is None and not recipe_names and of_model is not None
    for file, name in recipe_names:
        first = args.recipe or recipe_names[0][1]
        if name != first:
            raise UserError(f"{file.where}: is for recipe {name}, not {first}; name one recipe")
    if of_model is not None and is_of_model:
        base = of_model()
    elif args.recipe is None and not recipe_names:
        if files:
            raise UserError(f"{files[0].where}: names no recipe; add a line `recipe: NAME` "
                            "(`megatron-sov recipes` lists them), or pass RECIPE too")
        raise UserError("RECIPE: is missing; name a recipe (`megatron-sov recipes` lists them), or pass "
                        "--config FILE with a recipe in it", Fix(arguments=("RECIPE",)))
    elif args.recipe is None and is_complete:
        base, files = _read_whole_config(files[0]), files[1:]
    else:
        if args.recipe is None and is_reference(recipe_names[0][1]):  # a config file must not run code
            raise UserError(
                f"{recipe_names[0][0].where}: recipe = {recipe_names[0][1]!r} is code; pass it as RECIPE")
        base = _load_recipe(args.recipe or recipe_names[0][1])
    recipe, from_file = base, args.recipe is None and is_complete
    for file in files:
        base = file.apply_to(base)
    layered = frozenset(".".join(place) for file in files
                        for place, _ in _iter_leaves(RunConfig, file.value, ()))
    changed = {key for key in layered if get_setting(base, key) != get_setting(recipe, key)}
    if from_file:
        changed |= _find_changed_settings(recipe)
    return RecipeRequest(base, settings, from_file, is_model_only=is_of_model, layered=layered,
                         changed=frozenset(changed - {"recipe", "code"}))


DERIVED = ("recipe", "code", "data.phases", "train.steps", "train.tokens", "train.epochs")
"""Settings in config.json that a command computes from others."""


def _find_changed_settings(config: RunConfig) -> set[str]:
    """Return the settings in a run's config.json that differ from its recipe and from defaults."""
    of_model = build_base_config(config.recipe, config.model, config.train.precision, "sft")
    reference_configs = (RunConfig(config.recipe, config.model),
                         recipes.get(config.recipe) if config.recipe in recipes.names() else of_model)
    return {key for key in setting_names() if key not in DERIVED and not key.startswith("model.")
            and get_setting(config, key) not in [get_setting(other, key) for other in reference_configs]}


def _refuse_two_lengths(config: RunConfig, requested: Collection[str]) -> None:
    """Reject a run length that another setting overrides."""
    lengths = [key for key in LENGTHS if key in requested and get_setting(config, key)]
    budgets = [f"data.phases.{i}.tokens" for i, phase in enumerate(config.data.phases)
               if phase.tokens and {"data.phases", f"data.phases.{i}.tokens"} & set(requested)]
    if "train.tokens" in lengths:
        lengths[-1:] = [*budgets[:1], "train.tokens"]
    if len(lengths) > 1:
        winner, *others = lengths
        raise SettingsError("", [SettingsProblem(
            ProblemCode.INERT, others[0],
            f"has no effect with {winner} = {format_setting(get_setting(config, winner))}: "
            "both say how long the run is", get_setting(config, others[0]), "set one of them")])


def request_training(args: TrainingOptions, objective: BuiltIn, *, needs_data: bool = True,
                     lengthens: bool = False, of_model: Callable[[], RunConfig] | None = None,
                     resumed: RunConfig | None = None) -> RecipeRequest:
    """Return the settings requested from a training command, without reading data or checkpoint.

    Args:
        args: parsed options.
        objective: objective of the command; plug-in objectives use commands with "lm".
        needs_data: whether --data is required.
        lengthens: whether the command extends contexts; the objective of a recipe with stages then applies
            after the stages.
        of_model: see `request_recipe`.
        resumed: settings of the resumed run.

    Raises:
        UserError: as `request_recipe`, or --data is missing.
    """
    request = request_recipe(args, of_model)
    if needs_data and not args.data and not request.base.data.paths:
        local = list_data(objectives.COMMAND_FORMATS[objective][0])
        raise UserError("--data: is missing; pass a file of chats, pairs or text, or a folder made by "
                        "`sov-data pack`", Fix(options=("--data", *(local[:1] or ["DIR"]))))
    learned = request.base.objective
    has_stages = lengthens and request.base.extend.stages and not request.from_file
    if learned.name == "lm" or has_stages:  # "lm" is the default of recipes without an objective
        learned = dataclasses.replace(learned, name=objective)
    flags = ("train.deterministic=true",) if args.deterministic else ()
    return dataclasses.replace(request, base=dataclasses.replace(request.base, objective=learned),
                               settings=(*request.settings, *flags), trains_by=objective,
                               command="extend" if lengthens else BUILT_IN[objective],
                               resumed=resumed)


_VARIANT = re.compile("-(base|instruct|it)$")
"""End of a name on the hub that leaves the architecture unchanged."""


def _load_recipe(recipe: str) -> RunConfig:
    if "=" in recipe and not is_reference(recipe):
        raise UserError(f"{recipe}: is a setting in the place of RECIPE; write --set {shlex.quote(recipe)}, "
                        "and name a recipe (`megatron-sov recipes` lists them)")
    if suggest_download(recipe) and ":" not in recipe:
        released = _find_released(recipe)
        # other sizes of the family are no fix
        close = (f"; {released!r} has its architecture" if released else
                 suggest_same_family(recipe.rpartition("/")[2], recipes.names()))
        raise UserError(f"{recipe}: is a model name on the Hugging Face hub, not a recipe{close} "
                        "(`megatron-sov recipes` lists them); pass weights by --from HF_DIR",
                        Fix(words={recipe: released}) if released else None)
    name = recipes.RECIPE_PLUGINS.load(recipe) if is_reference(recipe) else recipe
    config, code = recipes.get(name), recipes.RECIPE_PLUGINS.code(name)
    if code is None:
        return config
    # A recipe's code may name families and objectives by paths relative to the recipe's folder.
    names = {}
    for setting, registry in NAMED_BY_SETTINGS.items():
        part, _, field = setting.partition(".")
        value = str(getattr(getattr(config, part), field))
        if is_reference(value):
            if value.rpartition(":")[0].endswith(".py"):
                value = os.path.join(os.path.dirname(code.reference), value)
            names[setting] = registry.load(value)
    config = apply_settings(config, [f"{setting}={name}" for setting, name in names.items()])
    return dataclasses.replace(config, code=(code,))


def _find_released(model: str) -> str:
    """Return the first recipe with the config.json of a model on the Hugging Face hub, or ""."""
    base_name = _VARIANT.sub("", model.lower())
    for name in recipes.names():
        source = None if name.startswith("tiny-") else recipes.sources(name).get("model.*")
        if source and _VARIANT.sub("", source.where.partition(",")[0].lower()) == base_name:
            return name
    return ""


@dataclasses.dataclass(frozen=True)
class ConfigLayer:
    """Settings from a --config file."""

    where: str
    value: dict[str, Any]
    lines: Mapping[Place, int]

    def apply_to(self, base: RunConfig) -> RunConfig:
        """Return `base` with the file's settings. Raises `SettingsError`: all invalid settings."""
        changes = {".".join(place): value for place, value in _iter_leaves(RunConfig, self.value, ())}
        changes.pop("recipe", None)
        try:
            return apply_settings(base, [f"{key}={json.dumps(value)}" for key, value in changes.items()],
                                  self.where)
        except SettingsError as e:
            raise SettingsError(self.where, [dataclasses.replace(problem, line=self.find_line(problem.key))
                                             for problem in e.problems]) from None

    def find_line(self, key: str) -> int:
        place = split_key(key)
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 0)


def _read_layer(path: Path) -> ConfigLayer:
    where = f"--config {path}"
    if path.is_dir():
        raise UserError(f"{where}: is a folder; pass a file, such as the config.json in it")
    located = parse_located_yaml(read_settings_text(path, where))
    problems = located.problems
    if not problems and not isinstance(located.value, dict):
        problems = [SettingsProblem(ProblemCode.TYPE, "", "must be an object of settings", located.value)]
    if problems:
        raise SettingsError(where, problems)
    return ConfigLayer(where, located.value, located.lines)


def _is_whole_config(value: Mapping[str, Any]) -> bool:
    """Return whether a file has all required settings, like a run's config.json."""
    model = value.get("model")
    required_fields = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING
                       and f.default_factory is dataclasses.MISSING]
    return isinstance(model, dict) and all(name in model for name in required_fields)


def _read_whole_config(file: ConfigLayer) -> RunConfig:
    try:
        return from_dict(file.value)
    except UserError as e:
        raise UserError(f"{file.where}: {e}") from None


def _iter_leaves(cls: Any, value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (place, value) for each setting in a file; lists and name tables are single values."""
    if not dataclasses.is_dataclass(cls) or not isinstance(value, dict):
        yield place, value
        return
    for key, inner in value.items():
        hint = get_inner_hint(cls, key) if key in list_fields(cast(Any, cls)) else None
        yield from _iter_leaves(hint, inner, (*place, key))


def _register_code(setting: str) -> str:
    """Return a `key=value` setting with FILE.py:NAME replaced by a registered name; runs the file."""
    key, _, value = setting.partition("=")
    registry, value = NAMED_BY_SETTINGS.get(key), value.strip('"')
    return f"{key}={registry.load(value)}" if registry is not None and is_reference(value) else setting

