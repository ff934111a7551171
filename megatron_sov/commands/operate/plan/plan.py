"""Options and checks of `megatron-sov plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, DeclaredCommand, Flag
from megatron_sov.model.recipes.requested import RecipeOptions
from megatron_sov.model.recipes.stage_defaults import Stage
from megatron_sov.work.clusters import cluster

RUN_OPTIONS = ("recipe", "configs", "plugins", "settings", "data", "nproc", "cluster", "nodes", "sweep",
               "prove", "json", "start_from", "days", "budget")
"""Options that --calibrate refuses."""
STAGES: dict[str, Stage] = {"sft": "sft", "prefer": "preference", "distill": "distill"}
"""Stage of --from, typed in place of RECIPE -> objective."""
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


@dataclass(frozen=True)
class PlanRequest:
    """Checked options; the subclass selects the run function."""

    options: PlanOptions


class RecipePlan(PlanRequest):
    """A plan without --from."""


class TuningPlan(PlanRequest):
    """A plan with --from."""


class LayoutProof(PlanRequest):
    """--prove."""


class SpeedCalibration(PlanRequest):
    """--calibrate."""


def check_plan(options: PlanOptions) -> PlanRequest:
    """Raise `UserError` for options that contradict each other."""
    if options.calibrate or options.out is not None:
        _check_calibration(options)
        return SpeedCalibration(options)
    if options.cluster is None and options.parameters is not None:
        raise UserError(f"--parameters {options.parameters}: prices a run on a cluster; name it by --cluster")
    if options.cluster is None and (options.nodes is not None or options.sweep):
        option, fix = (("--sweep", "") if options.sweep
                       else (f"--nodes {options.nodes}", ", or pass --nproc"))
        raise UserError(f"{option}: looks at the nodes of a cluster; name it by --cluster{fix}")
    if options.cluster is not None and options.nproc is not None:
        raise UserError(f"--nproc {options.nproc}: --cluster {options.cluster} and --nodes decide; leave it "
                        "out")
    if options.days is not None or options.budget is not None:
        _check_budget(options)
        _check_model(options)
        return RecipePlan(options) if options.start_from is None else TuningPlan(options)
    _check_model(options)
    if options.prove:
        extra = next((name for name in ("sweep", "data", "parameters") if getattr(options, name)), None)
        if extra is not None:
            raise UserError(f"--prove: plays a layout, and --{extra} belongs to another plan; leave one of "
                            "them out")
        return LayoutProof(options)
    return RecipePlan(options) if options.start_from is None else TuningPlan(options)


PLAN = DeclaredCommand(PlanOptions, check_plan, {
    RecipePlan: "megatron_sov.commands.operate.plan.plan_run:plan_recipe",
    TuningPlan: "megatron_sov.commands.operate.plan.tuning_run:plan_tuning",
    LayoutProof: "megatron_sov.commands.operate.plan.prove_run:prove_layout",
    SpeedCalibration: "megatron_sov.commands.operate.plan.calibrate_run:calibrate_speed"},
    runs_in_checks=True)


def _check_model(options: PlanOptions) -> None:
    if options.start_from is None:
        if options.recipe in STAGES:
            raise UserError(f"{options.recipe}: is a stage, which needs a model: add --from FOLDER, or name "
                            "a recipe (`megatron-sov recipes` lists them)")
        return
    has_recipe = options.recipe is not None and options.recipe not in STAGES
    if has_recipe or options.configs:
        model = options.recipe if has_recipe else f"--config {options.configs[0]}"
        raise UserError(f"--from {options.start_from} and {model}: both say which model is trained; leave "
                        f"one out, or name a stage instead of a recipe ({', '.join(STAGES)})")


def _check_budget(options: PlanOptions) -> None:
    option = "--days" if options.days is not None else "--budget"
    if options.cluster is None:
        raise UserError(f"{option}: needs the GPUs that are paid for; name them by --cluster")
    if extra := [name for name in ("sweep", "prove") if getattr(options, name)]:
        raise UserError(f"{option} and --{extra[0]}: are two plans; leave one of them out")


def _check_calibration(options: PlanOptions) -> None:
    if not options.calibrate:
        raise UserError(f"--output {options.out}: is for --calibrate RUN ...; add it, or redirect stdout for "
                        "a plan")
    if extra := [name for name in RUN_OPTIONS if getattr(options, name)]:
        raise UserError(f"--calibrate {options.calibrate[0]}: looks at runs that are written down, and "
                        f"{extra[0]} belongs to one that is planned; leave one of them out")
    if options.parameters is not None:
        raise UserError(f"--parameters {options.parameters}: --calibrate begins with those of the package; "
                        "leave it out")
