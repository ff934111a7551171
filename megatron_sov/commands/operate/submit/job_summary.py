"""Data checks before a training job is submitted, and the printed summary of its data, time and cost."""

import dataclasses
import math
import sys

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_days, format_money, format_value
from megatron_sov.base.hints.paths import fix_by_packing
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.feasibility import (
    count_epochs, count_tokens, refuse_even_routing, refuse_unfit_data)
from megatron_sov.commands.train.setup.packed_files import find_files, list_packable_formats
from megatron_sov.commands.train.setup.starts import find_start
from megatron_sov.model.config import RunConfig, apply_settings, parse_data_paths
from megatron_sov.model.objectives import FORMATS
from megatron_sov.operate.slurm.stages import StageWork, parse_source_path
from megatron_sov.operate.slurm.submission import PreparedStage, print_scripts
from megatron_sov.plan.cluster_plan import quote_run
from megatron_sov.plan.footprint.gpu_capacity import find_imbalance_limit, format_imbalance_limit
from megatron_sov.plan.pages.quotes import QuoteTotals, sum_quotes
from megatron_sov.plan.pricing import Machines, build_pricing
from megatron_sov.runs.checkpoints import find_tokenizer_folder
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.work.clusters.cluster import ClusterProfile, parse_time_limit
from megatron_sov.work.clusters.units import SECONDS_PER_DAY


def check_data(work: StageWork) -> StageWork:
    """Refuse a training stage whose data do not fit it.

    Data that an earlier job has still to make are not looked at.

    Returns:
        The stage with the size of its data, their epochs, and the steps that `train.epochs` makes.

    Raises:
        UserError: vocabulary, tokenizer or epochs do not fit, see `refuse_unfit_data`.
    """
    if work.config is None or work.request is None:
        return work
    config, request, recipe_data = work.config, work.request, work.config.data
    refuse_even_routing(config)
    paths = work.data or tuple(recipe_data.paths)
    _refuse_files(work)
    if not paths or not all((parse_source_path(text) / MANIFEST).is_file() for text in paths):
        return work
    config = dataclasses.replace(config,
                                 data=dataclasses.replace(config.data, paths=parse_data_paths(list(paths))))
    is_initial = work.start_from is None
    # a checkpoint has its own vocabulary, not the recipe's
    rows = config.model.vocab_size if is_initial else sys.maxsize
    sources = open_sources(config.data.paths, rows, FORMATS, warns=False, is_fixed=not is_initial)
    if not config.rollout.rounds:
        stage = work.kind.objective if request.is_model_only and work.kind.objective != "lm" else None
        config = complete_stage(request, config, stage, work.num_ranks or None).config
    refuse_unfit_data(request, config, sources, is_initial=is_initial)
    if work.start_from is not None and work.start_from.exists():
        check_same_tokens(tokenizer_folder(sources), find_tokenizer_folder(find_start(work.start_from)))
    has_epochs = not config.rollout.rounds and not config.extend.stages
    return dataclasses.replace(
        work, config=dataclasses.replace(
            config, data=dataclasses.replace(recipe_data, phases=config.data.phases)),
        data_tokens=sum(source.num_tokens.get("train", 0) for source in sources),
        epochs=count_epochs(config, sources) if has_epochs else 0.0)


def _refuse_files(work: StageWork) -> None:
    """Refuse files in --data: all processes in a job would pack them at once."""
    if not any(parse_source_path(text).is_file() for text in work.data):
        return
    formats = list_packable_formats(work.kind.objective)
    tokenizer = find_tokenizer_folder(find_start(work.start_from)) if work.start_from else None
    for file in find_files(work.data, work.target, formats, tokenizer):
        fix = fix_by_packing(str(file.file), tokenizer, ["--format", file.format]) if tokenizer else None
        raise UserError(f"--data {file.argument}: is a file, and jobs read packed folders; pack it first "
                        "with `sov-data pack`", fix)


def show_dry_run(prepared: PreparedStage) -> None:
    """Print the scripts and the summary as comments; on stderr too if stdout is a file or pipe."""
    print_scripts(prepared)
    lines = summarize(prepared)
    for line in lines:
        print(f"# {line}")
    if not sys.stdout.isatty():
        for line in lines:
            print(line, file=sys.stderr)


def summarize(prepared: PreparedStage) -> list[str]:
    """Return a training stage's data, time and cost, a line each; [] for other stages."""
    work, job = prepared.work, prepared.jobs[0]
    if not work.kind.ranks or work.config is None:
        return []
    nodes, profile = max(job.layouts), job.profile
    settings = job.layouts[nodes]
    config = apply_settings(work.config, list(settings)) if settings else work.config
    prices = build_pricing(Machines(job.cluster, profile, nodes))
    has_steps = config.extend.stages or config.num_steps()
    quotes = quote_run(config, prices, (*work.settings, *settings)) if prices and has_steps else []
    unit = f"{profile.gpus_per_node} {prices.chip.name}" if prices else f"{profile.tasks_per_node} processes"
    lines = [f"summary   {work.stage} {config.recipe} on {nodes} x {unit}"]
    if prices and config.parallel.ep > 1:
        limit = find_imbalance_limit(config, prices.num_ranks, prices.chip)
        lines.append(f"experts   {format_imbalance_limit(config, limit)}")
    if not quotes:
        return [*lines, _format_data(work, config)]
    total = sum_quotes(quotes)
    data = f"tokens    {format_count(total.tokens)}" if config.extend.stages else _format_data(work, config)
    days = format_days(total.days * SECONDS_PER_DAY)
    gpu_hours = format_value(total.gpu_hours, 3)
    return [*lines, data, f"time      {days}, {gpu_hours} GPU-hours, predicted (docs/plan.md)",
            f"cost      {_format_cost(total)}", f"jobs      {_format_jobs(total, profile, job.time_limit)}"]


def _format_data(work: StageWork, config: RunConfig) -> str:
    rollout = config.rollout
    if rollout.rounds:
        return (f"data      {rollout.rounds:,} rounds of {rollout.prompts_per_round:,} prompts, each with "
                f"{rollout.samples_per_prompt:,} responses")
    tokens = count_tokens(config)
    if not work.data_tokens:
        return f"tokens    {format_count(tokens) if tokens else 'unknown'}; the data are not packed yet"
    return (f"tokens    {format_count(tokens)}: {format_value(work.epochs, 3)} epochs of the "
            f"{format_count(work.data_tokens)} tokens of the data")


def _format_cost(total: QuoteTotals) -> str:
    low, high = total.cost_range_usd
    if low == high:
        return format_money(total.cost_usd)
    return f"{format_money(total.cost_usd)} ({format_money(low)} to {format_money(high)})"


def _format_jobs(total: QuoteTotals, profile: ClusterProfile, time_limit: str) -> str:
    """Return how often a job is requeued until the work is done."""
    work_s = parse_time_limit(time_limit) - profile.signal_lead_s
    requeues = max(0, math.ceil(total.days * SECONDS_PER_DAY / work_s) - 1)
    return f"{requeues:,} requeue{'' if requeues == 1 else 's'} at the time limit {time_limit}"
