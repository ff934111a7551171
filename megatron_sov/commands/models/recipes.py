"""`megatron-sov recipes [RECIPE] [--set key=value ...] [--json | --yaml]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import add_options, excludes_field, read_options
from megatron_sov.model import objectives, recipes
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import RecipeOptions, load_plugins, request_recipe
from megatron_sov.model.recipes.sources import (
    Sources, ValueSource, derive_sources, label_changes, list_settings)

TINY = "tiny-"
"""Begin of the names of recipes that train on a laptop."""
JOBS = {"lm": "pretrain", "extend": "extend the context", "sft": "fine-tune", "distill": "distill",
        "preference": "learn from preferences", "policy": "reinforcement learning"}
"""Objective, or extend -> heading of its recipes."""
GIVEN = ValueSource("yours", "--config or --set")
KINDS = {"L": "sliding", "D": "linear", "G": "global"}
"""Letters of a pattern of layers -> what a summary calls their attention."""


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(RecipeOptions):
    """List the recipes, or print one with every setting and its source."""

    json: Annotated[bool, excludes_field("yaml")] = False
    """Print RECIPE's settings as JSON, without sources."""
    yaml: bool = False
    """Print RECIPE's settings as YAML that --config takes: change what you like, and leave out the rest."""
    tiny: bool = False
    """List the recipes for a laptop: the same structures with a few million parameters."""


add_arguments = partial(add_options, cls=RecipesOptions)


def run(typed: argparse.Namespace) -> int:
    """List recipes, families and objectives with their origin, or print one recipe's settings
    and their sources.

    Raises:
        UserError: the recipe or a --set key does not exist, or --set or --json stands without a recipe.
    """
    args = read_options(RecipesOptions, typed)
    if args.recipe is None and not args.configs:
        for given, used in (("--json", args.json), ("--yaml", args.yaml),
                            (f"--set {''.join(args.settings[:1])}", args.settings)):
            if used:
                raise UserError(f"{given}: needs a recipe; name one of {', '.join(recipes.names())}")
        load_plugins(args.plugins)
        print(format_recipe_list(args.tiny))
        return 0
    asked = request_recipe(args)
    config = asked.config()
    if args.json:
        print(format_json(config), end="")
    elif args.yaml:
        import yaml

        print(yaml.safe_dump(json.loads(format_json(config)), sort_keys=False, allow_unicode=True), end="")
    else:
        print(format_settings(config, _sources(args.recipe or config.recipe, asked.base, config)))
    return 0


def _sources(name: str, base: RunConfig, config: RunConfig) -> Sources:
    """Return where each value comes from; files and --set are compared with the recipe that they change."""
    try:
        sources, before = ({}, base) if is_reference(name) else (recipes.sources(name), recipes.get(name))
    except UserError:  # the file of a run whose recipe is not here
        sources, before = {}, base
    return derive_sources(sources, label_changes(before, config, GIVEN))


def format_recipe_list(tiny: bool = False) -> str:
    """Return a line for each recipe, under the job that it is for and by size; then the model families, the
    objectives, and what files add.

    Args:
        tiny: list the `tiny-` recipes, which train on a laptop, in place of the others.
    """
    configs = {name: recipes.get(name) for name in recipes.names() if name.startswith(TINY) == tiny}
    counts = {name: count_params(config.model).total for name, config in configs.items()}
    width = max(map(len, configs))
    lines = list[str]()
    for job, heading in JOBS.items():
        names = sorted((name for name, config in configs.items() if _job(config) == job),
                       key=lambda name: (counts[name], name))
        lines += [f"{heading}:",
                  *(f"  {name:<{width}}  {format_recipe_summary(configs[name])}" for name in names), ""]
    commands = (f"{name} (megatron-sov {command})" for name, command in objectives.BUILT_IN.items())
    lines += [f"model families: {', '.join(models.FAMILIES)}", f"objectives: {', '.join(commands)}"]
    rows = [(name, origin, _tried(name)) for name, origin in recipes.RECIPE_PLUGINS.listing()]
    rows += [(name, origin, "model family") for name, origin in models.FAMILY_PLUGINS.listing()]
    rows += [(name, origin, "objective") for name, origin in objectives.OBJECTIVE_PLUGINS.listing()]
    if rows:
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines += ["", "from files:",
                  *(f"  {name:<{widths[0]}}  {origin:<{widths[1]}}  {text}" for name, origin, text in rows)]
    more = "without --tiny: the recipes of whole models" if tiny else (
        f"--tiny: {len(recipes.names()) - len(configs)} recipes of the same structures for a laptop")
    return "\n".join([*lines, "", more])


def _job(config: RunConfig) -> str:
    return "extend" if config.extend.stages else config.objective.name


def _tried(name: str) -> str:
    """Return the summary of a package's recipe, or why there is none:
    one package must not hide all others."""
    try:
        return format_recipe_summary(recipes.get(name))
    except UserError as e:
        return str(e)


def format_settings(config: RunConfig, sources: Sources) -> str:
    """Return a line for every setting: name, value, kind of source, and where it stands or why."""
    found = list_settings(config, sources)
    values = [json.dumps(s.value, ensure_ascii=False) for s in found]
    width, value_width = max(len(s.key) for s in found), max(map(len, values))
    return "\n".join(
        f"{s.key:<{width}}  {value:<{value_width}}  {s.source.kind:<11}  {s.source.where}".rstrip()
        for s, value in zip(found, values, strict=True))


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
