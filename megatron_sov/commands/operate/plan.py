"""`megatron-sov plan RECIPE [--set key=value ...] [--nproc N | --cluster P --nodes N [--sweep]] [--json]`:
a run before it runs, step by step, and its memory, time and cost on a cluster.

`megatron-sov plan [RECIPE] --cluster P --nodes N [--days D] [--budget USD]`: tokens that recipes reach within
a budget.

`megatron-sov plan [sft|prefer|distill] --from FOLDER [--data DIR] --cluster P`: fine-tuning of a model.

`megatron-sov plan --calibrate RUN ... --output FILE`: the parameters of speed, learned from runs."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag, add_options, read_options
from megatron_sov.model.config import RunConfig, apply_settings, parse_data_paths
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import RecipeOptions, RecipeRequest, request_recipe
from megatron_sov.model.recipes.stage_defaults import DEFAULTS, Stage, build_base_config, find_rate_settings
from megatron_sov.work.clusters import cluster

if TYPE_CHECKING:
    from megatron_sov.plan.speed.parameters import Parameters

OF_A_RUN = ("recipe", "configs", "plugins", "settings", "data", "nproc", "cluster", "nodes", "sweep", "prove",
            "json", "start_from", "days", "budget")
"""Arguments that --calibrate has no use for."""
STAGES: dict[str, Stage] = {"sft": "sft", "prefer": "preference", "distill": "distill"}
"""What --from may be trained by: word in the place of RECIPE -> objective."""
QUANTIZATION = "quantization_config"
"""Field of config.json that says how a folder's weights are packed, which decides nothing of a plan."""


CLUSTER = ("Price the run on the GPUs of this cluster: take the layout that is recommended for them, where "
           "no parallel.* is set, and tell memory, speed, days and cost "
           f"({', '.join(cluster.list_profiles())}, or a YAML file of your own).")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """Show what a run will do at each step, and what it takes on a cluster."""

    recipe: Annotated[str | None, Flag("RECIPE")] = None
    """Name of a recipe (`megatron-sov recipes` lists them), or FILE.py:FUNCTION of your own; with --from: sft
    (default), prefer or distill; without, --days or --budget compares all recipes."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = None
    """Plan to fine-tune this model; of a Hugging Face folder only config.json is read."""
    days: Annotated[AboveZero | None, Flag(value="DAYS")] = None
    """Say how many tokens RECIPE, or each recipe for pretraining, reaches on --cluster in so many days."""
    budget: Annotated[AboveZero | None, Flag(value="USD")] = None
    """The same for so many US dollars; with --days the smaller limit decides."""
    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR[:weight]")] = ()
    """Token shards made by `sov-data pack`: say how often the run reads them, and whether their vocabulary
    fits."""
    nproc: AtLeastOne | None = None
    """Check the settings for so many processes (default: as few as the layout needs)."""
    cluster: Annotated[str | None, Flag(value="PROFILE", help=CLUSTER)] = None
    nodes: AtLeastOne | None = None
    """Nodes of --cluster (default 1)."""
    sweep: bool = False
    """Look at all layouts on --cluster, take the fastest that fits, and say why; what --set says of the
    layout stays."""
    prove: bool = False
    """Play two steps of the layout by all its processes here, in miniature and float64, and compare losses,
    gradients, weights and states with one process'; ends with 3 where they differ."""
    json: bool = False
    """Print JSON instead of tables."""
    calibrate: Annotated[tuple[Path, ...], Flag(value="RUN", many=True)] = ()
    """In place of RECIPE: learn the parameters of speed from these runs of yours."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """Where --calibrate writes its parameters."""
    parameters: Annotated[Path | None, Flag(value="FILE")] = None
    """Price by these parameters, which --calibrate wrote."""


add_arguments = partial(add_options, cls=PlanOptions)


def run(typed: argparse.Namespace) -> int:
    """Print what a run will do: learning rate, batch size, tokens and blend; with --cluster also what it
    takes there.

    Raises:
        UserError: an unknown recipe or setting, settings that make no schedule, or a run that does not fit
            the cluster's GPUs.
    """
    args = read_options(PlanOptions, typed)
    if args.calibrate or args.out is not None:
        return _calibrate(args)
    if args.cluster is None and args.parameters is not None:
        raise UserError(f"--parameters {args.parameters}: prices a run on a cluster; name it by --cluster")
    if args.cluster is None and (args.nodes is not None or args.sweep):
        asked = "--sweep" if args.sweep else f"--nodes {args.nodes}"
        raise UserError(f"{asked}: looks at the nodes of a cluster; name it by --cluster"
                        + ("" if args.sweep else ", or pass --nproc"))
    if args.cluster is not None and args.nproc is not None:
        raise UserError(f"--nproc {args.nproc}: --cluster {args.cluster} and --nodes decide; leave it out")
    if (args.days or args.budget) is not None:
        return _within_budget(args)
    request = _read_request(args)
    if args.prove:
        return _prove(args, request)
    return _on_cluster(args, request) if args.cluster else _schedule(args, request)


def _read_request(args: PlanOptions) -> RecipeRequest:
    """Return what the command was asked for: a recipe, or a stage of post-training of --from.

    Raises:
        UserError: it cannot be used, or the length of the stage is not known.
    """
    if args.start_from is None:
        if args.recipe in STAGES:
            raise UserError(f"{args.recipe}: is a stage, which needs a model: add --from FOLDER, or name a "
                            "recipe (`megatron-sov recipes` lists them)")
        return request_recipe(args)
    named = args.recipe is not None and args.recipe not in STAGES
    if named or args.configs:
        given = args.recipe if named else f"--config {args.configs[0]}"
        raise UserError(f"--from {args.start_from} and {given}: both say which model is trained; leave one "
                        f"out, or name a stage instead of a recipe ({', '.join(STAGES)})")
    stage = STAGES[args.recipe or "sft"]
    asked = request_recipe(dataclasses.replace(args, recipe=None), partial(_base_of, args.start_from, stage))
    learned = dataclasses.replace(asked.base.objective, name=stage)
    asked = dataclasses.replace(asked, trains_by=stage, base=dataclasses.replace(
        asked.base, objective=learned,
        data=dataclasses.replace(asked.base.data, paths=parse_data_paths(args.data))))
    return _completed(args, asked, stage)


def _base_of(start_from: Path, stage: Stage) -> RunConfig:
    """Return the settings that a stage of post-training begins with; weights are not opened."""
    from megatron_sov.commands.train.setup.starts import find_start
    from megatron_sov.model.families import supported as families
    from megatron_sov.model.families.family import extract_text_config
    from megatron_sov.model.pretrained import CONFIG, find_hub_name, read_json
    from megatron_sov.runs.checkpoints import IMPORTED_RECIPE, read_checkpoint_settings

    # the folder of a run has a config.json too, without the type of a Hugging Face model
    fields = read_json(start_from / CONFIG) if (start_from / CONFIG).is_file() else {}
    if "model_type" not in fields:
        settings = read_checkpoint_settings(find_start(start_from))
        name = find_hub_name(start_from) if settings.recipe == IMPORTED_RECIPE else settings.recipe
        return build_base_config(name, settings.model, "bf16", stage, settings.lora)
    try:
        fields = extract_text_config(fields)
        family = families.get_family(str(fields.get("model_type")))
        model = family.from_hf_config({name: value for name, value in fields.items() if name != QUANTIZATION})
    except UserError as e:
        raise UserError(f"--from {start_from}: {e}") from None
    return build_base_config(find_hub_name(start_from), model, "bf16", stage)


def _completed(args: PlanOptions, asked: RecipeRequest, stage: Stage) -> RecipeRequest:
    """Return a stage of post-training with the settings that follow from its data, or from its length.

    Raises:
        UserError: the data cannot be read, are of another kind, or nothing says how long the stage is.
    """
    from megatron_sov.commands.train.setup.data_defaults import complete_stage
    from megatron_sov.commands.train.setup.training import check_chats
    from megatron_sov.model.objectives import COMMAND_FORMATS
    from megatron_sov.plan.pricing import machines
    from megatron_sov.runs.launch_environment import MAX_LOCAL_RANKS
    from megatron_sov.train.data.token_shards import open_sources

    config = asked.config()
    said = {setting.partition("=")[0] for setting in asked.settings}
    if config.data.paths:
        sources = open_sources(config.data.paths, config.model.vocab_size, COMMAND_FORMATS[stage],
                               warns=False,
                               is_fixed=True)
        if stage == "sft":
            check_chats(config, sources)
        num_gpus = (machines(args.cluster, args.nodes).num_ranks if args.cluster else args.nproc) or 1
        config = complete_stage(asked, config, stage, min(num_gpus, MAX_LOCAL_RANKS)).config
        return dataclasses.replace(asked, base=config)
    if not said & {"train.steps", "train.tokens"}:
        raise UserError(f"--from {args.start_from}: nothing says how long the stage is; pass --data DIR made "
                        "by `sov-data pack`, or --set train.tokens=100000000")
    config = apply_settings(config,
                            list(find_rate_settings(config, stage, count_params(config.model).total, said)))
    train = dataclasses.replace(config.train, epochs=0.0)
    if "train.global_batch_size" not in said:
        train = dataclasses.replace(train, global_batch_size=DEFAULTS[stage].batch_size)
    phases = tuple(dataclasses.replace(phase, seq_len=min(phase.seq_len, config.model.max_position_tokens))
                   for phase in config.data.phases)
    data = dataclasses.replace(config.data, phases=phases)
    return dataclasses.replace(asked, base=dataclasses.replace(config, train=train, data=data))


def _within_budget(args: PlanOptions) -> int:
    """Print how many tokens recipes reach within --days and --budget."""
    from megatron_sov.base.artifacts import format_json
    from megatron_sov.model.recipes.requested import load_plugins
    from megatron_sov.plan.on_cluster import budget_rows, budget_text, pretraining_requests
    from megatron_sov.plan.pricing import machines

    option = "--days" if args.days is not None else "--budget"
    if args.cluster is None:
        raise UserError(f"{option}: needs the GPUs that are paid for; name them by --cluster")
    if other := [name for name in ("sweep", "prove") if getattr(args, name)]:
        raise UserError(f"{option} and --{other[0]}: are two plans; leave one of them out")
    where = machines(args.cluster, args.nodes)
    if args.recipe or args.configs or args.start_from:
        request = _read_request(args)
        requests = {request.base.recipe: request}
    else:
        load_plugins(args.plugins)
        requests = pretraining_requests(args.settings)
    rows = budget_rows(requests, where, args.days, args.budget, _learned(args.parameters))
    if args.json:
        print(format_json({"cluster": args.cluster, "nodes": where.nodes, "gpus": where.num_ranks,
                           "days": args.days, "budget_usd": args.budget,
                           "recipes": [row.as_json() for row in rows]}))
    else:
        print(budget_text(rows, where))
    return 0


def _prove(args: PlanOptions, request: RecipeRequest) -> int:
    """Compare the layout with one process; returns 3 where they differ."""
    if other := [name for name in ("sweep", "data", "parameters") if getattr(args, name)]:
        raise UserError(f"--prove: plays a layout, and --{other[0]} belongs to another plan; leave one of "
                        "them out")
    from megatron_sov.engine.parallel import cpu_shims

    # before megatron-core is imported, whatever the machine has
    cpu_shims.prepare_without_gpu()
    from megatron_sov.base.artifacts import format_json
    from megatron_sov.plan.on_cluster import placed
    from megatron_sov.plan.pricing import machines
    from megatron_sov.proof.proving import EQUAL, as_json, as_text, prove_run

    if args.cluster is not None:
        where = machines(args.cluster, args.nodes)
        config, num_ranks = placed(request, where).config, where.num_ranks
    else:
        config = request.config()
        num_ranks = args.nproc or math.lcm(config.parallel.ranks_per_replica,
                                           config.parallel.ranks_per_expert_replica)
    small, verdict = prove_run(config, num_ranks)
    print(format_json(as_json(small, verdict)) if args.json else as_text(small, verdict))
    return ExitCode.OK if verdict.outcome == EQUAL else ExitCode.GATE_FAILED


def _schedule(args: PlanOptions, request: RecipeRequest) -> int:
    from megatron_sov.base.artifacts import format_json
    from megatron_sov.plan.on_cluster import memory_lines
    from megatron_sov.plan.pages import telling

    config = request.config()
    # the fewest processes that are whole replicas of the trunk and of the experts
    num_ranks = args.nproc or math.lcm(config.parallel.ranks_per_replica,
                                       config.parallel.ranks_per_expert_replica)
    config.check(num_ranks)
    data = _data_lines(args, config)
    if args.json:
        print(format_json(telling.timetable_json(config)))
    else:
        print("\n".join([telling.size_line(config), *data, memory_lines(config, num_ranks)]))
        print(f"\n{telling.timetable_text(config)}")
    return 0


def _on_cluster(args: PlanOptions, request: RecipeRequest) -> int:
    """Print what a run takes on a cluster; nothing is built, CUDA is not asked."""
    from megatron_sov.base.artifacts import format_json
    from megatron_sov.plan.on_cluster import placed, searched
    from megatron_sov.plan.pages import telling
    from megatron_sov.plan.pricing import machines

    assert args.cluster is not None
    where = machines(args.cluster, args.nodes)
    learned = _learned(args.parameters)
    found = (searched(request, where, _recipe_words(args), learned) if args.sweep
             else placed(request, where, learned))
    data = _data_lines(args, found.config)
    if args.json:
        print(format_json(telling.timetable_json(found.config) | found.as_json()))
    else:
        print("\n".join([*data, found.as_text()]))
        if not args.sweep:
            print(f"\n{telling.timetable_text(found.config)}")
    return 0


def _data_lines(args: PlanOptions, config: RunConfig) -> list[str]:
    """Return how often a run reads its data, and what is to be set for their vocabulary.

    Raises:
        UserError: a folder holds no token shards, or the vocabulary is larger than the model's.
    """
    from megatron_sov.base.artifacts import read_manifest
    from megatron_sov.base.figures import format_count, format_value
    from megatron_sov.model.config.data import split_source_name
    from megatron_sov.schedules import Schedule

    found = [read_manifest(split_source_name(path)[1], "tokens").content
             for path in parse_data_paths(args.data)]
    if not found:
        return []
    vocab_size = max(content["vocab_size"] for content in found)
    if vocab_size > config.model.vocab_size:
        raise UserError(f"--data: its tokenizer has {vocab_size:,} ids, the model only model.vocab_size = "
                        f"{config.model.vocab_size:,}; pass --set model.vocab_size={vocab_size}")
    tokens = sum(source["splits"]["train"]["num_tokens"]
                 for content in found for source in content["sources"])
    schedule = Schedule(config)
    read = schedule.count_tokens(schedule.num_steps - 1)
    lines = [f"data: {format_count(tokens)} tokens, of which the run reads {format_count(read)} "
             f"({format_value(read / max(tokens, 1), 3)} passes)"]
    if vocab_size < config.model.vocab_size and args.start_from is None:
        lines.append(f"data: its tokenizer has {vocab_size:,} ids, model.vocab_size is "
                     f"{config.model.vocab_size:,}; pass --set model.vocab_size={vocab_size} for a model "
                     "without unused ones")
    return lines


def _recipe_words(args: PlanOptions) -> list[str]:
    """Return what names the recipe on the command line."""
    words = [*([args.recipe] if args.recipe else []),
             *(word for path in args.configs for word in ("--config", str(path)))]
    return words + [word for plugin in args.plugins for word in ("--plugin", plugin)]


def _calibrate(args: PlanOptions) -> int:
    """Learn the parameters of speed from runs."""
    if not args.calibrate:
        raise UserError(f"--output {args.out}: is for --calibrate RUN ...; add it, or redirect stdout for a "
                        "plan")
    if given := [name for name in OF_A_RUN if getattr(args, name)]:
        raise UserError(f"--calibrate {args.calibrate[0]}: looks at runs that are written down, and "
                        f"{given[0]} belongs to one that is planned; leave one of them out")
    if args.parameters is not None:
        raise UserError(f"--parameters {args.parameters}: --calibrate begins with those of the package; "
                        "leave it out")
    from megatron_sov.plan.calibration.calibrate import calibrate

    print(calibrate(args.calibrate, args.out))
    return 0


def _learned(file: Path | None) -> Parameters | None:
    """Return what stands in a file; None: what comes with the package holds."""
    if file is None:
        return None
    from megatron_sov.plan.speed.parameters import read_parameters

    return read_parameters(file)
