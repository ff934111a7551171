"""RECIPE or --config, --plugin, --set: what all commands that start from a recipe share.  No torch here.

Here, and nowhere else, stands which code is run: what the command line names, and what code so named says
itself.  A config file is data; what it names is looked up among what is known already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import is_reference, load
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.base.settings import Flag
from megatron_sov.model import families as models, objectives, recipes
from megatron_sov.model.config import RunConfig, apply_settings, from_dict
from megatron_sov.model.families.family import Family

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
    """Name of a recipe (`megatron-sov recipes` lists them), or FILE.py:FUNCTION of your own."""
    config: Annotated[Path | None, Flag(value="FILE")] = None
    """In place of RECIPE: settings as a run's config.json has them."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Change a setting, e.g. --set train.steps=100 --set parallel.ep=2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions):
    """What is trained, on which data."""

    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR[:weight]")] = ()
    """Token shards made by `sov-data pack`; several are mixed by weight, and NAME renames their sources
    (needed, except where --config names them)."""
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
    trains_by: BuiltIn | None = None
    """Objective of a training command; None: any."""

    def config(self, defaults: Sequence[str] = (), own: Sequence[str] = ()) -> RunConfig:
        """Return the resolved settings, with the code that they name on record.

        Args:
            defaults: settings that --set goes before.
            own: settings that go before --set.

        Raises:
            UserError: a setting does not exist, a family or objective that nobody has named,
                or one of another command.
        """
        # Later settings win.
        config = apply_settings(self.base, [*defaults, *self.settings, *own])
        models.get(config.model.family, config.code)
        objectives.check(config)
        if self.trains_by is not None:
            _check_command(config.objective.name, self.trains_by)
        used = [models.OWN.code(config.model.family), objectives.OWN.code(config.objective.name)]
        code = (*(c for c in config.code if c.kind == "recipe"), *(c for c in used if c is not None))
        return dataclasses.replace(config, code=code)


def requested(args: RecipeOptions) -> RecipeRequest:
    """Return what the options ask for; runs the code that they name.

    Raises:
        UserError: neither or both of RECIPE and --config, or one of them, --plugin or --set cannot be used.
    """
    # First: the recipe and the settings may name what these files declare.
    load_plugins(args.plugins)
    if (args.recipe is None) == (args.config is None):
        given = (f"{args.recipe} and --config {args.config}: both are given" if args.recipe
                 else "RECIPE: is missing")
        raise UserError(f"{given}; name a recipe (`megatron-sov recipes` lists them), "
                        "or pass --config FILE in its place")
    base = _of_file(args.config) if args.config else _of_recipe(args.recipe or "")
    return RecipeRequest(base, tuple(_named(setting) for setting in args.settings), args.recipe is None)


def training_request(args: TrainingOptions, objective: BuiltIn, *, needs_data: bool = True,
                     lengthens: bool = False) -> RecipeRequest:
    """Return what a training command was asked for; neither its data nor its checkpoint need be there.

    Args:
        args: what was typed.
        objective: what the command trains by; objectives of your own go by commands that train by "lm".
        needs_data: whether data must be named.
        lengthens: whether the command lengthens contexts: a recipe with stages for that says in its objective
            what is trained behind them.

    Raises:
        UserError: as `requested`, or no data is named.
    """
    asked = requested(args)
    if needs_data and not args.data and not asked.base.data.paths:
        raise UserError("--data: is missing; pass a folder made by `sov-data pack`")
    learned = asked.base.objective
    before = lengthens and asked.base.extend.stages and not asked.from_file
    if learned.name == "lm" or before:  # "lm" is what every recipe says that leaves it open
        learned = dataclasses.replace(learned, name=objective)
    flags = ("train.deterministic=true",) if args.deterministic else ()
    return dataclasses.replace(asked, base=dataclasses.replace(asked.base, objective=learned),
                               settings=(*asked.settings, *flags), trains_by=objective)


def _check_command(name: str, trains_by: BuiltIn) -> None:
    if name != trains_by and (name in objectives.BUILT_IN or trains_by != "lm"):
        raise UserError(f"objective.name = {name}: this command trains by {trains_by!r}; leave the setting "
                        f"out, or use `megatron-sov {objectives.BUILT_IN.get(name, 'pretrain')}`")


def _of_recipe(recipe: str) -> RunConfig:
    if "=" in recipe and not is_reference(recipe):
        raise UserError(f"{recipe}: stands where the recipe does; write --set {shlex.quote(recipe)}, and "
                        "name a recipe (`megatron-sov recipes` lists them)")
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


def _of_file(path: Path) -> RunConfig:
    """Return the settings of a config.json, which are data from wherever it comes."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        why = "is a folder; pass the config.json in it" if path.is_dir() else f"cannot be read as JSON ({e})"
        raise UserError(f"--config {path}: {why}") from None
    try:
        return from_dict(raw)
    except UserError as e:
        raise UserError(f"--config {path}: {e}") from None


def _named(setting: str) -> str:
    """Return a setting with a name in place of the file that it names, which is run."""
    key, _, value = setting.partition("=")
    registry, value = NAMED_BY_SETTINGS.get(key), value.strip('"')
    return f"{key}={registry.load(value)}" if registry is not None and is_reference(value) else setting
