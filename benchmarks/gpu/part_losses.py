"""Losses of tiny recipes, GPU against CPU, and of a CPU run that continues on the GPU and then on the CPU.

Another machine can run the rung of the CPU: the journal then carries its losses, and `work` its run.
"""

import hashlib
import json
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from setting import Figures, Setting, fail_on, find_largest, read_losses

RECIPES = ("tiny-solar-open", "tiny-k-exaone")
WAYS = {"bf16": ("train.precision=bf16",),
        "bf16 zero1": ("train.precision=bf16", "parallel.zero1=true"),
        "bf16 offloaded": ("train.precision=bf16", "parallel.zero1=true", "gpu.optimizer_offload=0.5"),
        "fp32": ("train.precision=fp32",),
        "fp64": ("train.precision=fp64",)}
"""Name -> settings; the CPU run omits those of `gpu`."""
LIMITS = {"bf16": 2e-2, "bf16 zero1": 2e-2, "bf16 offloaded": 2e-2, "fp32": 1e-4, "fp64": 1e-9}
"""Largest relative difference between the losses of a step on GPU and CPU, which add in another order. COMMON
lowers the learning rate: at the recipes' 4e-3 the loss jumps at step 14, and rounding alone changes it by 27
%."""
COMMON = ("optim.lr=3e-4", "model.vocab_size=512", "train.global_batch_size=8", "train.micro_batch_size=4",
          "train.eval_every_steps=0", "train.keep_checkpoints=0", "data.heldout_tokens=2048",
          "data.max_epochs=0")
SMALL = ("model.num_layers=2", "model.hidden_size=64", "model.num_experts=4", "train.global_batch_size=2",
         "train.micro_batch_size=2",
         'data.phases=[{"name": "main", "seq_len": 128}]')
"""Settings of a dry run, which checks only that the commands work."""


def plan_packing(setting: Setting) -> tuple[Path, list[list[str | Path]]]:
    """Return the folder of token shards, packed from Python's standard library, and the commands that write
    it (none if it exists)."""
    folder = setting.work / "data"
    if (folder / "manifest.json").is_file():
        return folder, []
    texts, tokenizer = setting.work / "texts.jsonl", setting.work / "tokenizer"
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40 if setting.dry else 160]
    lines = (json.dumps({"text": f.read_text(encoding="utf-8", errors="replace")}) + "\n" for f in files)
    texts.write_text("".join(lines), encoding="utf-8")
    return folder, [
        ["sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", "512", "--input", texts,
         "--output", tokenizer, "--overwrite"],
        ["sov-data", "pack", "--tokenizer", tokenizer, "--input", f"code={texts}", "--heldout", "0.1",
         "--output", folder]]


def build_training_command(setting: Setting, recipe: str, run: Path, steps: int, *settings: str,
                           resume: bool = False) -> list[str | Path]:
    """Return the command that starts or resumes the pretraining of a recipe for `steps` steps."""
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # a part that failed earlier may have left it
    options = [word for text in (*COMMON, f"train.steps={steps}", *settings) for word in ("--set", text)]
    folder, _ = plan_packing(setting)
    return ["megatron-sov", "pretrain", recipe, "--data", folder, "--run", run, "--nproc", "1",
            *options, *["--resume"] * resume]


def copy_run_at(run: Path, step: int, copy: Path) -> Path:
    """Copy a run to `copy`, reset to its checkpoint after `step` so that the copy can resume."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "complete.json").unlink(missing_ok=True)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def read_routers(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return name -> weight [experts, hidden] of all routers in the checkpoint of `step`."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((run / f"checkpoints/step-{step}/model").rglob("*.safetensors")):
        weights |= {name: tensor for name, tensor in load_file(file).items() if "router.weight" in name}
    return weights


@dataclass(frozen=True)
class Comparison:
    """A recipe trained with the settings `WAYS[way]` on the GPU, and without their `gpu.*` on the CPU."""

    recipe: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.recipe}, {self.way}"

    def settings(self, setting: Setting, steps: int, *, on_gpu: bool) -> tuple[str, ...]:
        """Return the settings of the run on a device."""
        settings = (*SMALL * setting.dry, *WAYS[self.way], f"train.checkpoint_every_steps={steps // 2}")
        return settings if on_gpu else tuple(text for text in settings if not text.startswith("gpu."))

    def run(self, setting: Setting, steps: int, *, on_gpu: bool) -> Path:
        """Return the run folder, named by a digest of the settings: ways that are equal on the CPU share
        it."""
        words = " ".join((self.recipe, *self.settings(setting, steps, on_gpu=on_gpu)))
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        return setting.work / f"{self.recipe}-{'gpu' if on_gpu else 'cpu'}-{digest}"

    def command(self, setting: Setting, steps: int, *, on_gpu: bool) -> list[str | Path]:
        """Return the command of the run on a device."""
        return build_training_command(setting, self.recipe, self.run(setting, steps, on_gpu=on_gpu), steps,
                                      *self.settings(setting, steps, on_gpu=on_gpu))

    def figures(self, setting: Setting, steps: int, cpu: list[float]) -> tuple[dict[str, Any], list[str]]:
        """Return the figures (GPU losses and their largest relative difference from the CPU's), and the
        problems: a difference above `LIMITS`, or a router without updates."""
        run = self.run(setting, steps, on_gpu=True)
        gpu = read_losses(run)
        worst = find_largest(abs(a - b) / abs(b) for a, b in zip(gpu, cpu, strict=True))
        first, last = (read_routers(run, step) for step in (steps // 2, steps))
        unchanged = [n for n in first if torch.equal(first[n], last[n])]
        problems = []
        if not first or unchanged:
            problems.append(f"{self.name}: routers that do not learn: {unchanged or 'none found'}")
        if not worst <= LIMITS[self.way]:
            problems.append(f"{self.name}: losses differ by {worst:.2e}, more than {LIMITS[self.way]:g}")
        return {"worst relative difference": worst, "gpu": gpu, "routers": len(first)}, problems


def list_comparisons() -> list[Comparison]:
    """Return a comparison for each recipe and each of `WAYS`."""
    return [Comparison(recipe, way) for recipe in RECIPES for way in WAYS]


def get_num_steps(setting: Setting) -> int:
    """Return the number of training steps of a compared run."""
    return 4 if setting.dry else 20


STAYING, MOVED = "a run that stays on the CPU", "run-on-both-devices"
"""Figure of the CPU's rung with the losses of a run, and the folder of this run after its first half."""


def list_moved_settings(setting: Setting) -> tuple[str, ...]:
    """Return the settings of the run that moves between devices."""
    half = get_num_steps(setting) // 2
    return (*SMALL * setting.dry, *WAYS["fp32"], f"train.checkpoint_every_steps={half}")


def measure(setting: Setting, case: str) -> Figures:
    """Yield the figures of a rung.

    Raises:
        Failed: losses differ by more than `LIMITS`, or a command fails.
    """
    return {"cpu": measure_cpu, "gpu": measure_gpu, "moved": measure_moved}[case](setting)


def measure_cpu(setting: Setting) -> Figures:
    """Pack data, train on the CPU, and yield the losses of each run. Only the data and the half of the run
    that moves remain in `work`."""
    steps, half = get_num_steps(setting), get_num_steps(setting) // 2
    staying = setting.work / "staying"
    runs = {c.name: c.run(setting, steps, on_gpu=False) for c in list_comparisons()} | {STAYING: staying}
    commands = {c.run(setting, steps, on_gpu=False): c.command(setting, steps, on_gpu=False)
                for c in list_comparisons()}
    commands[staying] = build_training_command(setting, RECIPES[0], staying, 3 * half,
                                               *list_moved_settings(setting))
    _, packing = plan_packing(setting)
    problems = list(setting.run_commands([*packing, *commands.values()], on_gpu=False))
    fail_on([problem for problem in problems if problem])
    yield from ((name, read_losses(run)) for name, run in runs.items())
    copy_run_at(staying, half, setting.work / MOVED)
    for run in commands:
        shutil.rmtree(run)


def measure_gpu(setting: Setting) -> Figures:
    """Yield the figures of each comparison with the CPU's losses."""
    steps, cpu = get_num_steps(setting), setting.get_figures("losses.cpu")
    problems: list[str] = []
    commands = [c.command(setting, steps, on_gpu=True) for c in list_comparisons()]
    for comparison, problem in zip(list_comparisons(), setting.run_commands(commands), strict=True):
        if problem:
            problems.append(problem)
            continue
        figures, differences = comparison.figures(setting, steps, cpu[comparison.name])
        yield comparison.name, figures
        problems += differences
    fail_on(problems)


def measure_moved(setting: Setting) -> Figures:
    """Continue the CPU's run on the GPU and then on the CPU; yield the difference from the run that stays."""
    half, stayed = get_num_steps(setting) // 2, setting.get_figures("losses.cpu")[STAYING]
    run = copy_run_at(setting.work / MOVED, half, setting.work / "on-the-gpu")
    for on_gpu in (True, False):
        command = build_training_command(setting, RECIPES[0], run, 3 * half, *list_moved_settings(setting),
                                         resume=True)
        fail_on([problem for problem in setting.run_commands([command], on_gpu=on_gpu) if problem])
        if on_gpu:
            run = copy_run_at(run, 2 * half, setting.work / "and-back")
    worst = find_largest(abs(a - b) / abs(b) for a, b in zip(read_losses(run), stayed, strict=True))
    yield "CPU, GPU, CPU", {"worst relative difference": worst}
    if not worst <= LIMITS["fp32"]:
        fail_on([f"a run that moves differs from one that stays by {worst:.2e}"])
