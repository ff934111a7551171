"""`megatron-sov recipes [RECIPE] [--set key=value ...] [--json | --yaml]`."""

import json
from dataclasses import dataclass
from textwrap import indent
from typing import Annotated

import yaml

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import align_columns, format_count
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import DeclaredCommand, excludes_field
from megatron_sov.model import objectives, recipes
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import RecipeOptions, load_plugins, request_recipe
from megatron_sov.model.recipes.sources import (
    Sources, ValueSource, derive_sources, label_changes, list_settings)

TINY = "tiny-"
"""Prefix for recipes that train on a laptop."""
JOBS = {"lm": "pretrain", "extend": "extend the context", "sft": "fine-tune", "distill": "distill",
        "preference": "learn from preferences", "policy": "reinforcement learning"}
"""Objective, or `extend` -> heading in the list."""
USER_VALUE = ValueSource("yours", "--config or --set")
KINDS = {"L": "sliding", "D": "linear", "G": "global"}
"""Letter in `attention_pattern` -> attention name."""


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(RecipeOptions):
    """List the recipes, or print a recipe's settings with their sources."""

    json: Annotated[bool, excludes_field("yaml")] = False
    """Print RECIPE's settings as JSON, without sources."""
    yaml: bool = False
    """Print RECIPE's settings as YAML for --config; you may change values and omit unchanged settings."""
    tiny: bool = False
    """List the recipes for a laptop: the same structures with a few million parameters."""


def show_recipes(options: RecipesOptions) -> None:
    """Print recipes, families and objectives, or the settings of one recipe with their sources."""
    if options.recipe is None and not options.configs:
        for option, is_set in (("--json", options.json), ("--yaml", options.yaml),
                               (f"--set {''.join(options.settings[:1])}", options.settings)):
            if is_set:
                raise UserError(f"{option}: needs a recipe; pass one of {', '.join(recipes.names())}")
        load_plugins(options.plugins)
        print(format_recipe_list(options.tiny))
        return
    request = request_recipe(options)
    config = request.config()
    if options.json:
        print(format_json(config), end="")
    elif options.yaml:
        print(yaml.safe_dump(json.loads(format_json(config)), sort_keys=False, allow_unicode=True), end="")
    else:
        sources = _derive_sources(options.recipe or config.recipe, request.base, config)
        print(format_settings(config, sources))


RECIPES = DeclaredCommand(RecipesOptions, show_recipes)


def _derive_sources(name: str, base: RunConfig, config: RunConfig) -> Sources:
    """Return the source of every value: the recipe, or --config and --set for changed values."""
    try:
        sources, before = ({}, base) if is_reference(name) else (recipes.sources(name), recipes.get(name))
    except UserError:  # config.json of a run with an unknown recipe
        sources, before = {}, base
    return derive_sources(sources, label_changes(before, config, USER_VALUE))


def format_recipe_list(tiny: bool = False) -> str:
    """List the recipes by job and size, only the `tiny-` recipes or the others, then model families,
    objectives, and plugins."""
    configs = {name: recipes.get(name) for name in recipes.names() if name.startswith(TINY) == tiny}
    counts = {name: count_params(config.model).total for name, config in configs.items()}
    jobs = {name: "extend" if config.extend.stages else config.objective.name
            for name, config in configs.items()}
    width = max(map(len, configs))
    lines = list[str]()
    for job, heading in JOBS.items():
        names = sorted((name for name in configs if jobs[name] == job), key=lambda name: (counts[name], name))
        lines += [f"{heading}:",
                  *(f"  {name:<{width}}  {format_recipe_summary(configs[name])}" for name in names), ""]
    commands = (f"{name} (megatron-sov {command})" for name, command in objectives.BUILT_IN.items())
    lines += [f"model families: {', '.join(models.FAMILIES)}", f"objectives: {', '.join(commands)}"]
    rows = [(name, origin, _try_summary(name)) for name, origin in recipes.RECIPE_PLUGINS.listing()]
    rows += [(name, origin, "model family") for name, origin in models.FAMILY_PLUGINS.listing()]
    rows += [(name, origin, "objective") for name, origin in objectives.OBJECTIVE_PLUGINS.listing()]
    if rows:
        lines += ["", "from files:", indent(align_columns(rows, left=range(3)), "  ")]
    more = "without --tiny: recipes at full size" if tiny else (
        f"--tiny: {len(recipes.names()) - len(configs)} recipes with the same structures for a laptop")
    return "\n".join([*lines, "", more])


def _try_summary(name: str) -> str:
    """Format a plugin's recipe, or its error: a broken plugin must not hide working plugins."""
    try:
        return format_recipe_summary(recipes.get(name))
    except UserError as e:
        return str(e)


def format_settings(config: RunConfig, sources: Sources) -> str:
    """Format a line per setting: name, value, kind and location of the source."""
    settings = list_settings(config, sources)
    values = [json.dumps(s.value, ensure_ascii=False) for s in settings]
    width, value_width = max(len(s.key) for s in settings), max(map(len, values))
    return "\n".join(
        f"{s.key:<{width}}  {value:<{value_width}}  {s.source.kind:<11}  {s.source.where}".rstrip()
        for s, value in zip(settings, values, strict=True))


def format_recipe_summary(config: RunConfig) -> str:
    model, count = config.model, count_params(config.model)
    experts = (f"{model.num_experts_per_token} of {model.num_experts} experts" if model.num_experts
               else "dense")
    attention = " + ".join(kind for letter, kind in KINDS.items() if letter in model.attention_pattern)
    tokens = sum(p.tokens for p in config.data.phases) or config.train.tokens
    if config.train.steps:
        budget = f"{config.train.steps:,} steps"
    else:
        budget = f"{format_count(tokens)} tokens"
    return (f"{format_count(count.total)} parameters ({format_count(count.active)} active), {experts}, "
            f"{attention} attention, {budget}")
