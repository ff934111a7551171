"""`megatron-sov convert from-megatron`: a checkpoint of Megatron-LM or Megatron-Bridge as one of ours."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.config import ModelConfig
from megatron_sov.errors import ExitCode, UserError, nearest
from megatron_sov.settings import parse_nested


def add_from_megatron(action: Callable[[str, str], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Declare the action; returns its parser."""
    sub = action("from-megatron", "write a torch_dist checkpoint of Megatron-LM, Megatron-Bridge or NeMo as "
                                  "one that any layout can load")
    sub.add_argument("megatron_dir", metavar="DIR", type=Path,
                     help="folder of an iteration (iter_0001000), or the one that holds them")
    sub.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write")
    sub.add_argument("--family", default="", metavar="NAME",
                     help="family of the model (default: the only one that fits)")
    sub.add_argument("--recipe", default="", metavar="RECIPE",
                     help="take the architecture from a recipe, and not from what the checkpoint says")
    sub.add_argument("--set", dest="settings", action="append", default=[], metavar="model.NAME=VALUE",
                     help="a field of the architecture that the checkpoint says wrongly or not at all; may "
                          "be repeated")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR",
                     help="folder of its tokenizer, to put beside the weights")
    return sub


def run_from_megatron(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    overrides, family = model_settings(args.settings), args.family
    if args.recipe:
        model = dataclasses.asdict(recipes.get(args.recipe).model)
        family = family or model["family"]
        overrides = {name: value for name, value in model.items() if name != "family"} | overrides
    if args.tokenizer is not None and not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: has no tokenizer.json; name a tokenizer's folder")
    from megatron_sov.convert.megatron_import import from_megatron

    told = from_megatron(args.megatron_dir, args.out, args.dtype, family=family, overrides=overrides,
                         tokenizer=args.tokenizer, workers=args.workers, overwrite=args.overwrite)
    at = "" if told.iteration is None else f", iteration {told.iteration}"
    print(f"wrote checkpoint {args.out}: a model of family {told.model.family}{at}")
    if told.num_padded_rows:
        print(f"left out {told.num_padded_rows} rows of the vocabulary's matrices that stand behind the "
              f"{told.model.vocab_size} token ids")
    if told.num_optimizer_tensors:
        print(f"left out {told.num_optimizer_tensors} tensors of the optimizer, which begins anew")
    return ExitCode.OK


def model_settings(settings: list[str]) -> dict[str, Any]:
    """Return what `--set model.NAME=VALUE` says, by field of `ModelConfig`.

    Raises:
        UserError: one is no field of the architecture.
    """
    known = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "family"]
    parsed = parse_nested(settings)
    given = parsed.pop("model", {})
    for name in [*parsed, *(f"model.{name}" for name in given if name not in known)]:
        instead = nearest(name.removeprefix("model."), known, "model.")
        raise UserError(f"--set {name}: is no field of the architecture{instead}; fields are "
                        "model.num_layers and the like")
    return dict(given)
