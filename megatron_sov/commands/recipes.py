"""`megatron-sov recipes [NAME] [--set key=value ...] [--json]`."""

from __future__ import annotations

import argparse
import json

from megatron_sov import recipes
from megatron_sov.artifacts import to_json
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.models.count import num_params
from megatron_sov.recipes.sources import Source, Sources, derive, relabelled, settings

SET = Source("yours", "--set")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov recipes`."""
    parser.add_argument("name", nargs="?", metavar="NAME",
                        help="print this recipe's settings and where each comes from (default: list all)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                        help="change a setting of NAME before it is printed, e.g. --set train.steps=100")
    parser.add_argument("--json", action="store_true", help="print NAME's settings as JSON, without sources")


def run(args: argparse.Namespace) -> int:
    """List the recipes with a line each, or print one with every setting resolved and its source.

    Raises:
        UserError: NAME or a --set key does not exist, or --set or --json stands without NAME.
    """
    if args.name is None:
        if args.json:
            raise UserError(f"--json: needs a recipe to print; name one of {', '.join(recipes.names())}")
        if args.settings:
            raise UserError(f"--set {args.settings[0]}: needs a recipe to change; name one of {', '.join(recipes.names())}")
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:<{width}}  {summary(recipes.get(name))}")
        return 0
    recipe = recipes.get(args.name)
    config = apply_settings(recipe, args.settings)
    if args.json:
        print(to_json(config), end="")
    else:
        print(as_text(config, derive(recipes.sources(args.name), relabelled(recipe, config, SET))))
    return 0


def as_text(config: RunConfig, sources: Sources) -> str:
    """Return a line for every setting: name, value, kind of source, and where it stands or why."""
    found = settings(config, sources)
    values = [json.dumps(s.value, ensure_ascii=False) for s in found]
    width, value_width = max(len(s.key) for s in found), max(map(len, values))
    return "\n".join(
        f"{s.key:<{width}}  {value:<{value_width}}  {s.source.kind:<11}  {s.source.where}".rstrip()
        for s, value in zip(found, values, strict=True))


def summary(config: RunConfig) -> str:
    """Return a recipe in one line: parameters, experts, attention, budget."""
    model, count = config.model, num_params(config.model)
    experts = f"{model.num_experts_per_token} of {model.num_experts} experts" if model.num_experts else "dense"
    attention = "sliding + global attention" if "L" in model.attention_pattern else "global attention"
    tokens = sum(p.tokens for p in config.data.phases) or config.train.tokens
    budget = f"{config.train.steps:,} steps" if config.train.steps else \
        f"{tokens / 1e12:.4g} T tokens" if tokens >= 1e12 else f"{tokens / 1e9:.4g} B tokens"
    return f"{billions(count.total)} parameters ({billions(count.active)} active), {experts}, {attention}, {budget}"


def billions(count: int) -> str:
    """Return a parameter count in billions, or in millions below one billion."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
