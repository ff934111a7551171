"""Options and checks for `megatron-sov plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, DeclaredCommand, Flag
from megatron_sov.model.recipes.requested import RecipeOptions
from megatron_sov.model.recipes.stage_defaults import Stage
from megatron_sov.work.clusters import cluster

STAGES: dict[str, Stage] = {"sft": "sft", "prefer": "preference", "distill": "distill"}
"""Word that replaces RECIPE with --from -> stage that it plans."""
CLUSTER = ("Show memory, speed, days and cost on this cluster, with the recommended layout unless parallel.* "
           f"is set ({', '.join(cluster.list_profiles())}, or your own YAML file).")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """Show a run's schedule, and its layout, memory, speed, days and cost on a cluster."""

    recipe: Annotated[str | None, Flag("RECIPE")] = None
    """Recipe name (`megatron-sov recipes` lists names), or FILE.py:FUNCTION. With --from: sft (default),
    prefer or distill. Without RECIPE, --days or --budget compares all recipes."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = None
    """Plan fine-tuning for this model; from a Hugging Face folder, only config.json is read."""
    days: Annotated[AboveZero | None, Flag(value="DAYS")] = None
    """Show how many tokens RECIPE, or every pretraining recipe, processes on --cluster within DAYS days."""
    budget: Annotated[AboveZero | None, Flag(value="USD")] = None
    """Show how many tokens a budget in US dollars buys on --cluster; with --days, the smaller limit
    applies."""
    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR[:weight]")] = ()
    """Token shards from `sov-data pack`: show epochs, and check the vocabulary."""
    nproc: AtLeastOne | None = None
    """Check the settings for N processes (default: the fewest that the layout needs)."""
    cluster: Annotated[str | None, Flag(value="PROFILE", help=CLUSTER)] = None
    nodes: AtLeastOne | None = None
    """Nodes in --cluster (default 1)."""
    routes: Annotated[Path | None, Flag(value="RUN")] = None
    """Price experts on --cluster with the loads that RUN, a run of the same model, recorded at its
    evaluations."""
    sweep: bool = False
    """Compare all layouts on --cluster, take the fastest that fits, and explain the choice; --set parallel.*
    restricts the layouts."""
    prove: bool = False
    """Train two steps with all the layout's processes here, in miniature and float64, and compare losses,
    gradients, weights and states with one process; exit code 3 if they differ."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class PlanRequest:
    """Options that passed `check_plan`; their subclass selects the function that runs, see `PLAN`."""

    options: PlanOptions


class RecipePlan(PlanRequest):
    """A plan without --from."""


class TuningPlan(PlanRequest):
    """A plan with --from."""


class LayoutProof(PlanRequest):
    """A plan with --prove: two training steps show whether the layout computes the same as one process."""


def check_plan(options: PlanOptions) -> PlanRequest:
    """Return the kind of plan that the options request. Raises `UserError`: options contradict each other."""
    if options.cluster is None and (options.nodes is not None or options.sweep or options.routes):
        # name one option that needs a cluster: --nodes, else --sweep, else --routes
        option, fix = "--sweep" if options.sweep else f"--routes {options.routes}", ""
        if options.nodes is not None:
            option, fix = f"--nodes {options.nodes}", ", or pass --nproc"
        raise UserError(f"{option}: needs a cluster; add --cluster{fix}", Fix(options=("--cluster", "h100")))
    if options.cluster is not None and options.nproc is not None:
        profile = cluster.load_profile(options.cluster, needs_account=False)
        # the fewest nodes that run all processes, rounded up
        nodes = max(options.nodes or 1, -(-options.nproc // profile.tasks_per_node))
        raise UserError(f"--nproc {options.nproc}: the processes are those of --nodes {nodes} of --cluster "
                        f"{options.cluster}; leave --nproc out",
                        Fix(options=("--nodes", str(nodes)), left_out=(f"--nproc {options.nproc}",)))
    _check_model(options)
    if options.days is not None or options.budget is not None:
        _check_budget(options)
    if options.prove:
        extra = next((name for name in ("sweep", "data", "routes") if getattr(options, name)), None)
        if extra is not None:
            raise UserError(f"--prove: checks a layout, and --{extra} belongs to another plan; leave one out")
        return LayoutProof(options)
    return RecipePlan(options) if options.start_from is None else TuningPlan(options)


PLAN = DeclaredCommand(PlanOptions, check_plan, {
    RecipePlan: "megatron_sov.commands.operate.plan.plan_run:plan_recipe",
    TuningPlan: "megatron_sov.commands.operate.plan.tuning_run:plan_tuning",
    LayoutProof: "megatron_sov.commands.operate.plan.prove_run:prove_layout"},
    runs_in_checks=True)


def _check_model(options: PlanOptions) -> None:
    """Raise `UserError` unless RECIPE and --from name one model, and a stage has a length."""
    if options.start_from is None:
        if options.recipe in STAGES:
            raise UserError(f"{options.recipe}: is a stage, which needs a model: add --from FOLDER, or name "
                            "a recipe (`megatron-sov recipes` lists them)")
        return
    has_recipe = options.recipe is not None and options.recipe not in STAGES
    if has_recipe or options.configs:
        model = options.recipe if has_recipe else f"--config {options.configs[0]}"
        raise UserError(f"--from {options.start_from} and {model}: both name a model; leave one out, or name "
                        f"a stage instead of a recipe ({', '.join(STAGES)})")
    changed = {setting.partition("=")[0] for setting in options.settings}
    if not options.data and not changed & {"train.steps", "train.tokens"}:
        raise UserError(f"--from {options.start_from}: the stage's length is unknown; pass --data DIR made "
                        "by `sov-data pack`, or --set train.tokens=100000000",
                        Fix(options=("--set", "train.tokens=100000000")))


def _check_budget(options: PlanOptions) -> None:
    """Raise `UserError` if --days or --budget lacks a cluster, or contradicts --sweep or --prove."""
    option = "--days" if options.days is not None else "--budget"
    if options.cluster is None:
        raise UserError(f"{option}: needs a cluster; add --cluster", Fix(options=("--cluster", "h100")))
    if extra := [name for name in ("sweep", "prove") if getattr(options, name)]:
        raise UserError(f"{option} and --{extra[0]}: exclude each other; leave one out")
