"""Training losses with each `train.fp8` recipe, compared with bf16 and with a resumed run.

Two processes: the complete runs one after another, then the resumed runs.
"""

from pathlib import Path
from typing import Any

from part_fp8 import RECIPES, available
from part_losses import COMMON, as_after, data, training
from setting import Cost, Figures, Setting, fail_on, losses, training_flops

LOSS_LIMIT = 1e-2
"""Largest relative difference between the mean last losses of an FP8 recipe and of bf16."""
MODEL = ("model.hidden_size=1024", "model.num_layers=8", "model.num_heads=16", "model.num_kv_heads=4",
         "model.head_dim=64", "model.num_experts=16", "model.num_experts_per_token=2",
         "model.expert_ffn_dim=1024", 'data.phases=[{"name": "main", "seq_len": 1024}]', "optim.lr=5e-4")
"""About half a billion parameters."""
TINY = ('data.phases=[{"name": "main", "seq_len": 256}]', "model.num_layers=2")
"""Settings of a dry run, in place of `MODEL`."""
BF16 = "bf16"


def num_steps(setting: Setting) -> int:
    """Return the number of training steps of a complete run."""
    return 4 if setting.dry else 50


def cost(setting: Setting) -> Cost:
    """Estimate the cost of the part: training with bf16 and four recipes, and the recipes' second halves
    again."""
    steps = num_steps(setting)
    runs = 1 + 1.5 * len(RECIPES)
    flops = training_flops("tiny-solar-open", (*COMMON, *(TINY if setting.dry else MODEL)), steps)
    return Cost(starts=2, steps=int(steps * runs), flops=runs * flops,
                cpu_flops=runs * flops if setting.dry else 0)


def compare(fp8: str, whole: list[float], bf16: list[float],
            resumed: list[float]) -> tuple[dict[str, Any], list[str]]:
    """Compare the losses of a recipe's complete run with those of bf16 and of the resumed run.

    Returns:
        The figures, with the relative difference of the mean over the last tenth of the steps; the problems.
    """
    num_last = max(1, len(whole) // 10)
    difference = sum(whole[-num_last:]) / sum(bf16[-num_last:]) - 1
    problems = []
    if not abs(difference) <= LOSS_LIMIT and fp8 != "nvfp4":
        problems.append(f"{fp8}: the loss is {difference:+.1%} from bf16's")
    if resumed != whole:
        problems.append(f"{fp8}: a resumed run has other losses")
    return {"last loss": whole[-1], "of bf16": bf16[-1], "apart": difference,
            "resumed the same": resumed == whole}, problems


def measure(setting: Setting) -> Figures:
    """Yield the figures of each recipe that the chip has.

    Raises:
        Failed: losses differ from bf16 or after a resume.
    """
    steps, reasons = num_steps(setting), available(setting)
    yield from ((fp8, f"not on this chip: {reason}") for fp8, reason in reasons.items() if reason)
    runs = {kind: setting.work / f"fp8-{kind}" for kind in (BF16, *(f for f in reasons if not reasons[f]))}
    # `train.deterministic` of the first run holds for all runs of the process
    common = (*(TINY if setting.dry else MODEL), "train.precision=bf16", "train.deterministic=true",
              f"train.checkpoint_every_steps={steps // 2}")

    def command(kind: str, run: Path, resume: bool) -> list[str | Path]:
        return training(setting, "tiny-solar-open", run, steps, *common,
                        *[f"train.fp8={kind}"] * (kind != BF16), resume=resume)

    # no commands if the part `losses` has already packed the data
    problems = [p for p in setting.commands(data(setting)[1], on_gpu=False) if p]
    ended = dict(zip(runs, setting.commands([command(k, run, False) for k, run in runs.items()]),
                     strict=True))
    for kind, problem in ended.items():
        yield f"{kind}, losses", problem or losses(runs[kind])
    problems += filter(None, ended.values())
    whole = [k for k, problem in ended.items() if not problem and k != BF16 and not ended[BF16]]
    again = [as_after(runs[k], steps // 2, setting.work / f"fp8-{k}-resumed") for k in whole]
    resumed = setting.commands([command(k, run, True) for k, run in zip(whole, again, strict=True)])
    for kind, run, problem in zip(whole, again, resumed, strict=True):
        found, wrong = ({}, [problem]) if problem else compare(kind, losses(runs[kind]), losses(runs[BF16]),
                                                               losses(run))
        yield kind, found
        problems += wrong
    fail_on(problems)
