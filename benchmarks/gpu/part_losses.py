"""Tiny recipes on the GPU against the same runs on the CPU."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from setting import Failed, Setting, largest, losses

RECIPES = ("tiny-solar-open", "tiny-k-exaone")
WAYS = {"bf16": ("train.precision=bf16",),
        "bf16 zero1": ("train.precision=bf16", "parallel.zero1=true"),
        "bf16 offloaded": ("train.precision=bf16", "parallel.zero1=true", "gpu.optimizer_offload=0.5"),
        "fp32": ("train.precision=fp32",),
        "fp64": ("train.precision=fp64",)}
"""Name -> settings; those of `gpu` are left out of the run on the CPU."""
LIMITS = {"bf16": 2e-2, "bf16 zero1": 2e-2, "bf16 offloaded": 2e-2, "fp32": 1e-4, "fp64": 1e-9}
"""Largest relative difference of a step's loss: what rounding makes of another order of sums."""
COMMON = ("model.vocab_size=512", "train.global_batch_size=8", "train.micro_batch_size=4",
          "train.eval_every_steps=0", "train.keep_checkpoints=0", "data.heldout_tokens=2048",
          "data.max_epochs=0")
SMALL = ("model.num_layers=2", "model.hidden_size=64", "model.num_experts=4", "train.global_batch_size=2",
         "train.micro_batch_size=2",
         'data.phases=[{"name": "main", "seq_len": 128}]')
"""Of a dry run, which has only to come to its end."""


def data(setting: Setting) -> Path:
    """Return token shards of a part of Python's own library."""
    folder = setting.work / "data"
    if (folder / "manifest.json").is_file():
        return folder
    texts, tokenizer = setting.work / "texts.jsonl", setting.work / "tokenizer"
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40 if setting.dry else 160]
    lines = (json.dumps({"text": f.read_text(encoding="utf-8", errors="replace")}) + "\n" for f in files)
    texts.write_text("".join(lines), encoding="utf-8")
    setting.command("sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", "512", "--input",
                    texts, "--output", tokenizer, "--overwrite", on_gpu=False)
    setting.command("sov-data", "pack", "--tokenizer", tokenizer, "--input", f"code={texts}", "--heldout",
                    "0.1", "--output", folder, on_gpu=False)
    return folder


def train(setting: Setting, recipe: str, run: Path, steps: int, *settings: str, on_gpu: bool = True,
          resume: bool = False) -> list[float]:
    """Run a recipe, anew or where it stopped, and return its losses."""
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # of a part that failed before
    words = [word for given in (*COMMON, f"train.steps={steps}", *settings) for word in ("--set", given)]
    more = ["--resume"] if resume else []
    setting.command("megatron-sov", "pretrain", recipe, "--data", data(setting), "--run", run, "--nproc", "1",
                    *words, *more, on_gpu=on_gpu)
    return losses(run)


def as_after(run: Path, step: int, copy: Path) -> Path:
    """Return a copy of a complete run as it was after a step of which it has a checkpoint, to go on from."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "complete.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def routers(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of all routers in a checkpoint, without the optimizer's state of them."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run / f"checkpoints/step-{step}/model").rglob("*.safetensors")):
        found |= {n: t for n, t in load_file(file).items() if "router.weight" in n}
    return found


def compare(setting: Setting, recipe: str, way: str, steps: int) -> dict[str, Any]:
    """Return how far the GPU's losses are from the CPU's, and whether routers have learned.

    Raises:
        Failed: further than rounding explains, or a router stands still.
    """
    name = f"{recipe}-{way.replace(' ', '-')}"
    settings = (*SMALL * setting.dry, *WAYS[way], f"train.checkpoint_every_steps={steps // 2}")
    gpu = train(setting, recipe, setting.work / f"{name}-gpu", steps, *settings)
    plain = [word for word in settings if not word.startswith("gpu.")]
    cpu = train(setting, recipe, setting.work / f"{name}-cpu", steps, *plain, on_gpu=False)
    worst = largest(abs(a - b) / abs(b) for a, b in zip(gpu, cpu, strict=True))
    first, last = (routers(setting.work / f"{name}-gpu", step) for step in (steps // 2, steps))
    still = [n for n in first if torch.equal(first[n], last[n])]
    figures = {"worst relative difference": worst, "gpu": gpu, "cpu": cpu, "routers": len(first)}
    if not first or still:
        raise Failed(f"{recipe}, {way}: routers that do not learn: {still or 'none found'}", **figures)
    if not worst <= LIMITS[way]:
        raise Failed(f"{recipe}, {way}: losses differ by {worst:.2e}, more than {LIMITS[way]:g}", **figures)
    return figures


def to_the_cpu_and_back(setting: Setting, steps: int) -> dict[str, Any]:
    """Return how far a run that goes on on the CPU, then on the GPU again, is from one that stays.

    Raises:
        Failed: they differ by more than rounding explains.
    """
    way = (*SMALL * setting.dry, *WAYS["fp32"], f"train.checkpoint_every_steps={steps}")
    run = setting.work / "staying"
    staying = train(setting, RECIPES[0], run, 3 * steps, *way)
    moved = as_after(run, steps, setting.work / "on-the-cpu")
    train(setting, RECIPES[0], moved, 3 * steps, *way, on_gpu=False, resume=True)
    back = as_after(moved, 2 * steps, setting.work / "and-back")
    found = train(setting, RECIPES[0], back, 3 * steps, *way, resume=True)
    worst = largest(abs(a - b) / abs(b) for a, b in zip(found, staying, strict=True))
    if not worst <= LIMITS["fp32"]:
        raise Failed(f"a run that moves differs from one that stays by {worst:.2e}")
    return {"worst relative difference": worst}


def measure(setting: Setting) -> dict[str, Any]:
    """Return the figures of all comparisons."""
    steps = 4 if setting.dry else 20
    recipes, ways = (RECIPES[:1], ["fp32"]) if setting.dry else (RECIPES, list(WAYS))
    figures: dict[str, Any] = {f"{recipe}, {way}": compare(setting, recipe, way, steps)
                               for recipe in recipes for way in ways}
    return figures | {"GPU, CPU, GPU": to_the_cpu_and_back(setting, steps // 2)}
