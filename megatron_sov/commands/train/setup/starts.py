"""The model in --from: its folder, architecture and default settings. Imports neither torch nor numpy until
it reads the headers of a Hugging Face folder."""

import dataclasses
import math
import shlex
from functools import partial
from pathlib import Path

from megatron_sov import convert
from megatron_sov.base.errors import IS_CHECKING, Fix, UserError
from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.families.count import count_params
from megatron_sov.model.families.family import extract_text_config
from megatron_sov.model.families.supported import get_family
from megatron_sov.model.pretrained import CONFIG, find_hub_name, find_weight_files, is_hf_folder, read_json
from megatron_sov.model.recipes.requested import RecipeOptions, RecipeRequest, request_recipe
from megatron_sov.model.recipes.stage_defaults import Stage, build_base_config
from megatron_sov.runs.checkpoints import (
    IMPORTED_RECIPE, check_model_path, find_checkpoint, find_tokenizer_folder, read_checkpoint_settings,
    refuse_pointers)
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.stages.shared_copies import find_copy

QUANTIZATION = "quantization_config"
"""Field in config.json with the number format of the weights, which settings do not need."""


def find_start(start_from: Path) -> Path:
    """Return the checkpoint or Hugging Face folder in --from; for a run, its newest checkpoint."""
    check_model_path(start_from, "--from ")
    refuse_pointers(start_from, "--from ")
    return start_from if is_hf_folder(start_from) else find_checkpoint(start_from)


def find_start_tokenizer(start_from: Path | None) -> Path | None:
    """Return the tokenizer's folder for --from; None without --from, or if the path is wrong."""
    if start_from is None:
        return None
    try:
        return find_tokenizer_folder(find_start(start_from))
    except UserError:  # reported where --from is read
        return None


def read_start_model(start: Path) -> ModelConfig:
    """Read the architecture from a checkpoint or Hugging Face folder, without weights."""
    if is_hf_folder(start) and IS_CHECKING.get():
        if missing := [name for name in find_weight_files(start) if not (start / name).is_file()]:
            raise UserError(f"{start}: {missing[0]} is missing; download the folder again")
        return read_config_model(start)
    if is_hf_folder(start):
        return convert.open_weights(start).model
    return read_checkpoint_settings(start).model


def read_config_model(folder: Path) -> ModelConfig:
    """Read the architecture from a Hugging Face folder's config.json alone, without torch."""
    try:
        fields = extract_text_config(read_json(folder / CONFIG))
        family = get_family(str(fields.get("model_type")))
        return family.from_hf_config({name: value for name, value in fields.items() if name != QUANTIZATION})
    except UserError as e:
        raise UserError(f"--from {folder}: {e}") from None


def read_start_settings(start_from: Path, stage: Stage, has_gpus: bool | None = None) -> RunConfig:
    """Return a stage's default settings for the model in --from; `has_gpus`: see `model_settings`."""
    start = find_start(start_from)
    if is_hf_folder(start):
        uses_gpus = bool(list_visible_gpus()) if has_gpus is None else has_gpus
        return build_base_config(find_hub_name(start), read_start_model(start),
                                 "bf16" if uses_gpus else "fp32", stage)
    settings = read_checkpoint_settings(start)
    name = find_hub_name(start_from) if settings.recipe == IMPORTED_RECIPE else settings.recipe
    return build_base_config(name, settings.model, settings.train.precision, stage, settings.lora)


def request_with_model(options: RecipeOptions, start_from: Path, stage: Stage) -> RecipeRequest:
    """Return the settings of a command that accompanies a training command; see `request_recipe`."""
    request = request_recipe(options, partial(read_start_settings, start_from, stage))
    objective = dataclasses.replace(request.base.objective, name=stage)
    return dataclasses.replace(request, base=dataclasses.replace(request.base, objective=objective))


def read_matching_model(start_from: Path, request: RecipeRequest) -> ModelConfig:
    """Read the architecture from --from. Raises `UserError`: --from names no model, or a model of another
    family than the recipe."""
    model = read_start_model(find_start(start_from))
    family = request.base.model.family
    for setting in request.settings:  # the last setting counts
        key, _, value = setting.partition("=")
        if key == "model.family":
            family = value.strip('"')
    if model.family == family:
        return model
    names = ", ".join(recipes.find_family_recipes(model.family)) or "none: see `megatron-sov recipes`"
    raise UserError(f"--from {start_from}: is a {model.family} model, recipe {request.base.recipe} is for "
                    f"{family}; leave RECIPE out, which takes the model from --from (or choose from {names})",
                    Fix(left_out=(request.base.recipe,)))


def propose_recipe(start_from: Path) -> None:
    """Raise `UserError` for language modelling without RECIPE; propose recipes for the model's family."""
    model = read_start_model(find_start(start_from))
    configs = [recipes.get(name) for name in recipes.find_family_recipes(model.family)]
    candidates = [config for config in configs if config.objective.name == "lm" and not config.extend.stages]
    size = count_params(model).total
    candidates.sort(key=lambda config: (abs(math.log(count_params(config.model).total / size)),
                                        len(config.recipe)))
    if candidates:
        names = ", ".join(config.recipe for config in candidates[:4])
        raise UserError("RECIPE: is missing; steps, batches and learning rate come from a recipe for the "
                        f"model's family, {model.family}: {names}", Fix(arguments=(candidates[0].recipe,)))


def refuse_many_converters(start: Path, run: Path) -> None:
    """Raise `UserError` if several launcher processes would convert the same Hugging Face folder."""
    if num_ranks(None) > 1 and is_hf_folder(start) and find_copy(start, run) is None:
        raise UserError(f"--from {start}: many processes would convert it at once; run `megatron-sov convert "
                        "from-hf` first, and pass its output",
                        Fix(words={str(start): f"{start.name}-checkpoint"},
                            before=(f"megatron-sov convert from-hf {shlex.quote(str(start))} "
                                    f"{shlex.quote(start.name)}-checkpoint",)))
