"""Runs `megatron-sov plan` for recipes: the schedule, the price on a cluster, or tokens within a budget."""

from dataclasses import replace

from megatron_sov.base.artifacts import format_json, read_manifest
from megatron_sov.base.errors import UserError, stop_check
from megatron_sov.base.figures import format_count, format_value
from megatron_sov.commands.operate.plan.plan import PlanOptions, RecipePlan
from megatron_sov.model.config import RunConfig, parse_data_paths
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.recipes.requested import RecipeRequest, load_plugins, request_recipe
from megatron_sov.plan.budget import compute_budget_rows, format_budget, list_pretraining_requests
from megatron_sov.plan.cluster_plan import format_memory_lines, plan_on_cluster, plan_with_sweep
from megatron_sov.plan.pages import layout_report
from megatron_sov.plan.pricing import load_machines
from megatron_sov.runs.obs.routing import read_routes
from megatron_sov.schedules import Schedule


def plan_recipe(plan: RecipePlan) -> None:
    options = plan.options
    has_budget = options.days is not None or options.budget is not None
    if has_budget and options.recipe is None and not options.configs:
        load_plugins(options.plugins)
        stop_check()
        _print_budget(options, list_pretraining_requests(options.settings))
    else:
        print_plan(options, request_recipe(options))


def print_plan(options: PlanOptions, request: RecipeRequest) -> None:
    """Print the plan for a recipe or stage. Raises `UserError`: it does not fit the cluster's GPUs."""
    if options.cluster is not None:
        load_machines(options.cluster, options.nodes)
    request.config()
    if options.days is not None or options.budget is not None:
        stop_check()
        _print_budget(options, {request.base.recipe: request})
    elif options.cluster is not None:
        _print_on_cluster(options, options.cluster, request)
    else:
        _print_schedule(options, request)


def _print_budget(options: PlanOptions, requests: dict[str, RecipeRequest]) -> None:
    """Print the tokens that every recipe reaches within --days and --budget."""
    assert options.cluster is not None
    where = load_machines(options.cluster, options.nodes)
    rows = compute_budget_rows(requests, where, options.days, options.budget)
    if options.json:
        print(format_json({"cluster": options.cluster, "nodes": where.nodes, "gpus": where.num_ranks,
                           "days": options.days, "budget_usd": options.budget,
                           "recipes": [row.to_json() for row in rows]}))
    else:
        print(format_budget(rows, where))


def _print_schedule(options: PlanOptions, request: RecipeRequest) -> None:
    config = request.config()
    num_ranks = options.nproc or config.parallel.min_ranks
    config.check(num_ranks)
    data_lines = _describe_data(options, config)
    stop_check()
    if options.json:
        print(format_json(layout_report.timetable_to_json(config)))
    else:
        print("\n".join([layout_report.format_model_size(config),
              *data_lines, format_memory_lines(config, num_ranks)]))
        print(f"\n{layout_report.format_timetable(config)}")


def _print_on_cluster(options: PlanOptions, cluster: str, request: RecipeRequest) -> None:
    """Print layout, memory, speed, days and cost on a cluster."""
    where = load_machines(cluster, options.nodes)
    if options.routes is not None:
        where = replace(where, routes=read_routes(options.routes, request.config().model))
    if options.sweep:
        stop_check()  # takes minutes
    plan = (plan_with_sweep(request, where, _list_recipe_words(options)) if options.sweep
            else plan_on_cluster(request, where))
    data_lines = _describe_data(options, plan.config)
    stop_check()
    if options.json:
        print(format_json(layout_report.timetable_to_json(plan.config) | plan.to_json()))
        return
    print("\n".join([*data_lines, plan.format_text()]))
    if not options.sweep:
        print(f"\n{layout_report.format_timetable(plan.config)}")


def _describe_data(options: PlanOptions, config: RunConfig) -> list[str]:
    """Return lines with the passes over --data and with vocabulary settings to change."""
    shards = [read_manifest(split_source_name(path)[1], "tokens").content
              for path in parse_data_paths(options.data)]
    if not shards:
        return []
    vocab_size = max(content["vocab_size"] for content in shards)
    if vocab_size > config.model.vocab_size:
        raise UserError(f"--data: its tokenizer has {vocab_size:,} ids, the model only model.vocab_size = "
                        f"{config.model.vocab_size:,}; pass --set model.vocab_size={vocab_size}")
    tokens = sum(source["splits"]["train"]["num_tokens"]
                 for content in shards for source in content["sources"])
    schedule = Schedule(config)
    run_tokens = schedule.count_tokens(schedule.num_steps - 1)
    lines = [f"data: {format_count(tokens)} tokens, of which the run reads {format_count(run_tokens)} "
             f"({format_value(run_tokens / max(tokens, 1), 3)} passes)"]
    if vocab_size < config.model.vocab_size and options.start_from is None:
        lines.append(f"data: its tokenizer has {vocab_size:,} ids, model.vocab_size is "
                     f"{config.model.vocab_size:,}; pass --set model.vocab_size={vocab_size} for a model "
                     "without unused ids")
    return lines


def _list_recipe_words(options: PlanOptions) -> list[str]:
    """Return the command-line words for the recipe."""
    words = [options.recipe] if options.recipe else []
    for path in options.configs:
        words += ["--config", str(path)]
    for plugin in options.plugins:
        words += ["--plugin", plugin]
    return words
