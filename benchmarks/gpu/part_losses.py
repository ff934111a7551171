"""Losses of tiny recipes, GPU against CPU, and of a CPU run that continues on the GPU and then on the CPU.

Three processes: all runs on the CPU, all runs on the GPU, and the last resume on the CPU.
"""

import hashlib
import json
import math
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from setting import Cost, Figures, Setting, fail_on, largest, losses, training_flops

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


def data(setting: Setting) -> tuple[Path, list[list[str | Path]]]:
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


def training(setting: Setting, recipe: str, run: Path, steps: int, *settings: str,
             resume: bool = False) -> list[str | Path]:
    """Return the command that starts or resumes the pretraining of a recipe for `steps` steps."""
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # a part that failed earlier may have left it
    words = [word for given in (*COMMON, f"train.steps={steps}", *settings) for word in ("--set", given)]
    return ["megatron-sov", "pretrain", recipe, "--data", data(setting)[0], "--run", run, "--nproc", "1",
            *words, *["--resume"] * resume]


def as_after(run: Path, step: int, copy: Path) -> Path:
    """Copy a complete run to `copy`, reset to its checkpoint after `step` so that the copy can resume."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "complete.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def routers(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return name -> weight [experts, hidden] of all routers in the checkpoint of `step`."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run / f"checkpoints/step-{step}/model").rglob("*.safetensors")):
        found |= {n: t for n, t in load_file(file).items() if "router.weight" in n}
    return found


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
        given = (*SMALL * setting.dry, *WAYS[self.way], f"train.checkpoint_every_steps={steps // 2}")
        return given if on_gpu else tuple(word for word in given if not word.startswith("gpu."))

    def run(self, setting: Setting, steps: int, *, on_gpu: bool) -> Path:
        """Return the run folder, named by a digest of the settings: ways that are equal on the CPU share
        it."""
        words = " ".join((self.recipe, *self.settings(setting, steps, on_gpu=on_gpu)))
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        return setting.work / f"{self.recipe}-{'gpu' if on_gpu else 'cpu'}-{digest}"

    def command(self, setting: Setting, steps: int, *, on_gpu: bool) -> list[str | Path]:
        """Return the command of the run on a device."""
        return training(setting, self.recipe, self.run(setting, steps, on_gpu=on_gpu), steps,
                        *self.settings(setting, steps, on_gpu=on_gpu))

    def figures(self, setting: Setting, steps: int) -> tuple[dict[str, Any], list[str]]:
        """Return the figures (GPU and CPU losses and their largest relative difference), and the problems: a
        difference above `LIMITS`, or a router without updates."""
        gpu_run = self.run(setting, steps, on_gpu=True)
        gpu, cpu = losses(gpu_run), losses(self.run(setting, steps, on_gpu=False))
        worst = largest(abs(a - b) / abs(b) for a, b in zip(gpu, cpu, strict=True))
        first, last = (routers(gpu_run, step) for step in (steps // 2, steps))
        unchanged = [n for n in first if torch.equal(first[n], last[n])]
        problems = []
        if not first or unchanged:
            problems.append(f"{self.name}: routers that do not learn: {unchanged or 'none found'}")
        if not worst <= LIMITS[self.way]:
            problems.append(f"{self.name}: losses differ by {worst:.2e}, more than {LIMITS[self.way]:g}")
        return {"worst relative difference": worst, "gpu": gpu, "cpu": cpu, "routers": len(first)}, problems


def comparisons() -> list[Comparison]:
    """Return a comparison for each recipe and each of `WAYS`."""
    return [Comparison(recipe, way) for recipe in RECIPES for way in WAYS]


def num_steps(setting: Setting) -> int:
    """Return the number of training steps of a compared run."""
    return 4 if setting.dry else 20


def cost(setting: Setting) -> Cost:
    """Estimate the cost of the part: each run on both devices, and a run that changes its device twice."""
    steps, small = num_steps(setting), (*COMMON, *SMALL * setting.dry)
    flops = sum(training_flops(c.recipe, small, steps) for c in comparisons())
    return Cost(starts=3, steps=2 * steps * len(comparisons()) + 3 * steps, flops=flops,
                cpu_flops=2 * flops)


def measure(setting: Setting) -> Figures:
    """Yield the figures of all comparisons.

    Raises:
        Failed: losses differ by more than `LIMITS`, or a command fails.
    """
    steps, problems = num_steps(setting), []
    part_steps = steps // 2
    way = (*SMALL * setting.dry, *WAYS["fp32"], f"train.checkpoint_every_steps={part_steps}")
    staying = setting.work / "staying"
    cpu_runs = {c.run(setting, steps, on_gpu=False): c.command(setting, steps, on_gpu=False)
                for c in comparisons()}
    on_cpu = [*data(setting)[1], training(setting, RECIPES[0], staying, 3 * part_steps, *way),
              *cpu_runs.values()]
    problems += [problem for problem in setting.commands(on_cpu, on_gpu=False) if problem]
    yield "runs on the CPU", len(on_cpu) - len(problems)
    fail_on(problems)  # without CPU runs the GPU runs have no reference
    moved = as_after(staying, part_steps, setting.work / "on-the-gpu")
    on_gpu = [c.command(setting, steps, on_gpu=True) for c in comparisons()]
    on_gpu.append(training(setting, RECIPES[0], moved, 3 * part_steps, *way, resume=True))
    for comparison, problem in zip([*comparisons(), None], setting.commands(on_gpu), strict=True):
        problems += [problem] if problem else []
        if comparison and not problem:
            found, wrong = comparison.figures(setting, steps)
            yield comparison.name, found
            problems += wrong
    if not problem:
        back = as_after(moved, 2 * part_steps, setting.work / "and-back")
        [problem] = setting.commands([training(setting, RECIPES[0], back, 3 * part_steps, *way, resume=True)],
                                     on_gpu=False)
        worst = math.inf if problem else largest(
            abs(a - b) / abs(b) for a, b in zip(losses(back), losses(staying), strict=True))
        yield "CPU, GPU, CPU", {"worst relative difference": worst}
        if not worst <= LIMITS["fp32"]:
            problems.append(problem or f"a run that moves differs from one that stays by {worst:.2e}")
    fail_on(problems)
