"""Training losses with a `train.fp8` recipe, compared with bf16 and with a resumed run."""

from pathlib import Path

from part_fp8 import available
from part_losses import as_after, data, training
from setting import Figures, Setting, fail_on, losses

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


def num_steps(setting: Setting) -> int:
    """Return the number of training steps of a complete run."""
    return 4 if setting.dry else 50


def measure(setting: Setting, fp8: str) -> Figures:
    """Yield the losses of a recipe and of bf16, and of the resumed run with `DETERMINISTIC`.

    Raises:
        Failed: losses differ from bf16 or after a resume.
    """
    if reason := available(setting)[fp8]:
        yield fp8, f"not on this chip: {reason}"
        return
    steps = num_steps(setting)
    runs = {kind: setting.work / f"fp8-{kind}" for kind in (BF16, fp8)}
    common = (*(TINY if setting.dry else MODEL), "train.precision=bf16",
              f"train.checkpoint_every_steps={steps // 2}")

    def build_command(kind: str, run: Path, *, resume: bool = False) -> list[str | Path]:
        settings = [*[f"train.fp8={kind}"] * (kind != BF16),
                    *["train.deterministic=true"] * (kind == DETERMINISTIC)]
        return training(setting, "tiny-solar-open", run, steps, *common, *settings, resume=resume)

    # no commands for data that another rung has packed, and for the bf16 run of another recipe
    packing = setting.commands(data(setting)[1], on_gpu=False)
    missing = [kind for kind, run in runs.items() if kind == fp8 or not (run / "complete.json").is_file()]
    training_runs = setting.commands([build_command(kind, runs[kind]) for kind in missing])
    fail_on([problem for problem in (*packing, *training_runs) if problem])
    found, reference = losses(runs[fp8]), losses(runs[BF16])
    num_last = max(1, steps // 10)
    difference = sum(found[-num_last:]) / sum(reference[-num_last:]) - 1
    yield "losses", found
    yield "losses of bf16", reference
    yield "relative difference of the last losses", difference
    problems = []
    if not abs(difference) <= LOSS_LIMIT and fp8 != "nvfp4":
        problems.append(f"{fp8}: the loss is {difference:+.1%} from bf16's")
    if fp8 == DETERMINISTIC:
        again = as_after(runs[fp8], steps // 2, setting.work / f"fp8-{fp8}-resumed")
        fail_on([p for p in setting.commands([build_command(fp8, again, resume=True)]) if p])
        yield "resumed to the same bits", losses(again) == found
        if losses(again) != found:
            problems.append(f"{fp8}: a resumed run has other losses")
    fail_on(problems)
