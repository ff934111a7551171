"""Training losses with a `train.fp8` recipe, compared with bf16 and with a resumed run."""

from pathlib import Path

from part_fp8 import find_recipe_problems
from part_losses import build_training_command, copy_run_at, plan_packing
from setting import Figures, Setting, fail_on, read_losses

LOSS_LIMIT = 1e-2
"""Largest relative difference between the mean last losses of an FP8 recipe and of bf16."""
MODEL = ("model.hidden_size=1024", "model.num_layers=8", "model.num_heads=16", "model.num_kv_heads=4",
         "model.head_dim=64", "model.num_experts=16", "model.num_experts_per_token=2",
         "model.expert_ffn_dim=1024", 'data.phases=[{"name": "main", "seq_len": 1024}]', "optim.lr=5e-4")
"""About half a billion parameters."""
TINY = ('data.phases=[{"name": "main", "seq_len": 256}]', "model.num_layers=2")
"""Settings of a dry run, in place of `MODEL`."""
BF16, DETERMINISTIC = "bf16", "tensorwise"
"""The reference, and the recipe with `train.deterministic`: its resumed run must have equal bits."""


def get_num_steps(setting: Setting) -> int:
    """Return the number of training steps of a complete run."""
    return 4 if setting.dry else 50


def measure(setting: Setting, fp8: str) -> Figures:
    """Yield the losses of a recipe and of bf16, and of the resumed run with `DETERMINISTIC`.

    Raises:
        Failed: losses differ from bf16 or after a resume.
    """
    if reason := find_recipe_problems(setting)[fp8]:
        yield fp8, f"not on this chip: {reason}"
        return
    steps = get_num_steps(setting)
    runs = {kind: setting.work / f"fp8-{kind}" for kind in (BF16, fp8)}
    common = (*(TINY if setting.dry else MODEL), "train.precision=bf16",
              f"train.checkpoint_every_steps={steps // 2}")

    def build_command(kind: str, run: Path, *, resume: bool = False) -> list[str | Path]:
        settings = [*[f"train.fp8={kind}"] * (kind != BF16),
                    *["train.deterministic=true"] * (kind == DETERMINISTIC)]
        return build_training_command(setting, "tiny-solar-open", run, steps, *common, *settings,
                                      resume=resume)

    # no commands for data that another rung has packed, and for the bf16 run of another recipe
    packing = setting.run_commands(plan_packing(setting)[1], on_gpu=False)
    missing = [kind for kind, run in runs.items() if kind == fp8 or not (run / "complete.json").is_file()]
    training_runs = setting.run_commands([build_command(kind, runs[kind]) for kind in missing])
    fail_on([problem for problem in (*packing, *training_runs) if problem])
    losses, bf16_losses = read_losses(runs[fp8]), read_losses(runs[BF16])
    num_last = max(1, steps // 10)
    difference = sum(losses[-num_last:]) / sum(bf16_losses[-num_last:]) - 1
    yield "losses", losses
    yield "losses of bf16", bf16_losses
    yield "relative difference of the last losses", difference
    problems = []
    if not abs(difference) <= LOSS_LIMIT and fp8 != "nvfp4":
        problems.append(f"{fp8}: the loss is {difference:+.1%} from bf16's")
    if fp8 == DETERMINISTIC:
        resumed = copy_run_at(runs[fp8], steps // 2, setting.work / f"fp8-{fp8}-resumed")
        fail_on([p for p in setting.run_commands([build_command(fp8, resumed, resume=True)]) if p])
        yield "resumed to the same bits", read_losses(resumed) == losses
        if read_losses(resumed) != losses:
            problems.append(f"{fp8}: a resumed run has other losses")
    fail_on(problems)
