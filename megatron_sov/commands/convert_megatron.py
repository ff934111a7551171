"""`megatron-sov convert from-megatron`: a checkpoint of Megatron-LM or Megatron-Bridge as one of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_sov import recipes
from megatron_sov.commands.convert_options import FromMegatronOptions
from megatron_sov.config import ModelConfig
from megatron_sov.errors import ExitCode, UserError, nearest
from megatron_sov.settings import parse_nested


def run_from_megatron(args: FromMegatronOptions) -> int:
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


def model_settings(settings: Sequence[str]) -> dict[str, Any]:
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
