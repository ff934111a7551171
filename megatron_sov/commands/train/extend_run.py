"""Runs `megatron-sov extend`: a sequence of stages at growing contexts."""

import contextlib

from megatron_sov.commands.train.kinds import STAGE_KINDS
from megatron_sov.commands.train.setup.export_benchmarks import check_benchmarks
from megatron_sov.commands.train.setup.feasibility import refuse_unfit
from megatron_sov.commands.train.setup.stage_options import ExtendOptions
from megatron_sov.commands.train.setup.starts import find_start, refuse_many_converters
from megatron_sov.commands.train.setup.training import ExtensionRequest, check_extension
from megatron_sov.commands.train.training_run import convert_start, load_objective
from megatron_sov.model.objectives import get_factory
from megatron_sov.plan.footprint.gpu_capacity import estimate_memory
from megatron_sov.post.extend.running import run_stages
from megatron_sov.post.extend.stages import PlannedStage, plan_stages
from megatron_sov.runs.folder import STAGES
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.objectives.objective import get_formats


def check_proposal(options: ExtendOptions) -> None:
    """Check the stages, for proposed command lines whose data are packed."""
    request = check_extension(options)
    if request.request.config().data.paths:
        _plan_checked_stages(request)


def run_extension(request: ExtensionRequest) -> None:
    """Train all stages; check each before converting a Hugging Face folder or starting the first stage:
    settings, data and folders."""
    options, kind = request.options, STAGE_KINDS[request.options.stage]
    stages = _plan_checked_stages(request)
    last = stages[-1].config
    start = find_start(options.start_from)
    refuse_many_converters(start, options.run)
    if not options.dry_run:
        start = convert_start(start, options.run)
    try:
        objective = get_factory(last, load_objective(kind, last))
        run_stages(stages, start, objective=objective, nproc=options.nproc, resume=options.resume,
                   faults=request.faults, dry_run=options.dry_run,
                   memory=[estimate_memory(stage.config, num_ranks(options.nproc)) for stage in stages])
    finally:
        # after a failed start, remove empty folders; a dry run leaves the disk unchanged
        for folder in () if options.dry_run else (options.run / STAGES, options.run):
            with contextlib.suppress(OSError):  # not empty: a stage has begun
                folder.rmdir()


def _plan_checked_stages(request: ExtensionRequest) -> list[PlannedStage]:
    """Plan all stages, and check settings, data and folder of each."""
    options, kind = request.options, STAGE_KINDS[request.options.stage]
    stages = plan_stages(
        request.request, options.start_from, options.run, options.nproc,
        lambda config: get_formats(get_factory(config, load_objective(kind, config))))
    check_benchmarks(stages[-1].config)
    for stage in stages:
        stage.config.check(num_ranks(options.nproc))
        refuse_unfit(request.request, stage.config, None, options.nproc, is_initial=False,
                     dry_run=options.dry_run)
        stage.folder.enter(stage.config, options.resume)
    return stages
