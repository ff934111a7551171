"""`megatron-sov recipes [NAME] [--set key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_sov import recipes
from megatron_sov.artifacts import to_json
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.models.count import num_params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov recipes`."""
    parser.add_argument("name", nargs="?", metavar="NAME",
                        help="print this recipe's settings as JSON (default: list all recipes)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                        help="change a setting of NAME before it is printed, e.g. --set train.steps=100")


def run(args: argparse.Namespace) -> int:
    """List the recipes with a line each, or print one with every setting resolved.

    Raises:
        UserError: NAME or a --set key does not exist, or --set stands without NAME.
    """
    if args.name is None:
        if args.settings:
            raise UserError(f"--set {args.settings[0]}: needs a recipe to change; name one of {', '.join(recipes.names())}")
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:<{width}}  {summary(recipes.get(name))}")
        return 0
    print(to_json(apply_settings(recipes.get(args.name), args.settings)), end="")
    return 0


def summary(config: RunConfig) -> str:
    """Return a recipe in one line: parameters, experts, attention, budget."""
    model, count = config.model, num_params(config.model)
    experts = f"{model.num_experts_per_token} of {model.num_experts} experts" if model.num_experts else "dense"
    attention = "sliding + global attention" if "L" in model.attention_pattern else "global attention"
    tokens = sum(p.tokens for p in config.data.phases) or config.train.tokens
    budget = f"{tokens / 1e12:g} T tokens" if not config.train.steps else f"{config.train.steps:,} steps"
    return f"{billions(count.total)} parameters ({billions(count.active)} active), {experts}, {attention}, {budget}"


def billions(count: int) -> str:
    """Return a parameter count in billions, or in millions below one billion."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
