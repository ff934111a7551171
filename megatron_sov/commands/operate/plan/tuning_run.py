"""Runs `megatron-sov plan --from FOLDER`: the plan for a post-training stage."""

import dataclasses
from functools import partial
from pathlib import Path

from megatron_sov.commands.operate.plan.plan import STAGES, PlanOptions, TuningPlan
from megatron_sov.commands.operate.plan.plan_run import print_plan
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.starts import find_start, read_config_model
from megatron_sov.commands.train.setup.training import check_chats
from megatron_sov.model.config import RunConfig, apply_settings, parse_data_paths
from megatron_sov.model.families.count import count_params
from megatron_sov.model.objectives import COMMAND_FORMATS
from megatron_sov.model.pretrained import CONFIG, find_hub_name, read_json
from megatron_sov.model.recipes.requested import RecipeRequest, request_recipe
from megatron_sov.model.recipes.stage_defaults import DEFAULTS, Stage, build_base_config, find_rate_settings
from megatron_sov.plan.pricing import load_machines
from megatron_sov.runs.checkpoints import IMPORTED_RECIPE, read_checkpoint_settings
from megatron_sov.runs.launch_environment import MAX_LOCAL_RANKS
from megatron_sov.train.data.sources import open_sources


def plan_tuning(plan: TuningPlan) -> None:
    print_plan(plan.options, request_plan(plan.options))


def request_plan(options: PlanOptions) -> RecipeRequest:
    """Build the request for a recipe or, with --from, for a post-training stage."""
    if options.start_from is None:
        return request_recipe(options)
    stage = STAGES[options.recipe or "sft"]
    request = request_recipe(dataclasses.replace(options, recipe=None),
                             partial(_build_base, options.start_from, stage))
    objective = dataclasses.replace(request.base.objective, name=stage)
    data = dataclasses.replace(request.base.data, paths=parse_data_paths(options.data))
    base = dataclasses.replace(request.base, objective=objective, data=data)
    return _complete_request(options, dataclasses.replace(request, trains_by=stage, base=base), stage)


def _build_base(start_from: Path, stage: Stage) -> RunConfig:
    """Build default settings for a stage from the model's config; weights are not opened."""
    # the config.json of a run has no `model_type`
    fields = read_json(start_from / CONFIG) if (start_from / CONFIG).is_file() else {}
    if "model_type" not in fields:
        settings = read_checkpoint_settings(find_start(start_from))
        name = find_hub_name(start_from) if settings.recipe == IMPORTED_RECIPE else settings.recipe
        return build_base_config(name, settings.model, "bf16", stage, settings.lora)
    return build_base_config(find_hub_name(start_from), read_config_model(start_from), "bf16", stage)


def _complete_request(options: PlanOptions, request: RecipeRequest, stage: Stage) -> RecipeRequest:
    """Add the settings that follow from --data, or from the stage's length."""
    config = request.config()
    changed = {setting.partition("=")[0] for setting in request.settings}
    if config.data.paths:
        sources = open_sources(config.data.paths, config.model.vocab_size, COMMAND_FORMATS[stage],
                               warns=False, is_fixed=True)
        if stage == "sft":
            check_chats(config, sources)
        num_gpus = options.nproc
        if options.cluster:
            num_gpus = load_machines(options.cluster, options.nodes).num_ranks
        config = complete_stage(request, config, stage, min(num_gpus or 1, MAX_LOCAL_RANKS)).config
        return dataclasses.replace(request, base=config)
    rates = find_rate_settings(config, stage, count_params(config.model).total, changed)
    config = apply_settings(config, list(rates))
    train = dataclasses.replace(config.train, epochs=0.0)
    if "train.global_batch_size" not in changed:
        train = dataclasses.replace(train, global_batch_size=DEFAULTS[stage].batch_size)
    max_seq_len = config.model.max_position_tokens
    phases = tuple(dataclasses.replace(phase, seq_len=min(phase.seq_len, max_seq_len))
                   for phase in config.data.phases)
    data = dataclasses.replace(config.data, phases=phases)
    return dataclasses.replace(request, base=dataclasses.replace(config, train=train, data=data))
