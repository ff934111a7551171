"""Bytes of weights, gradients and optimizer states that `plan` predicts, compared with those that training
allocates: random valid layouts of all recipes, one rank of the whole world, on meta tensors.

Usage: python benchmarks/plan_bytes.py [--number 240] [--seed 1] > benchmarks/results/plan_bytes.txt

For each layout the library's own modules, data-parallel buffers and optimizer are made by one process that
plays a random rank in a fake group of all ranks (`tests/meta_memory.py`), and every byte is compared: the
gaps of ZeRO-1's buckets, filled-up vocabularies, copies of tied embeddings, the pieces of parameters that
this rank updates, by AdamW or Muon, here or in host memory, and what is frozen. Models in bf16 are made of
Transformer Engine's modules, by its double of the tests, which has their parameters; others of torch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, RunConfig, apply_settings
from megatron_sov.model.process_memory import StatePlace, States
from megatron_sov.plan.footprint.states import StageBuffers

DOUBLE = Path(__file__).parents[1] / "tests" / "te_double"
PATTERNS = ("*router.weight", "embedding.*", "decoder.layers.0.*", "*experts.linear_fc2.weight",
            "*norm.weight",
                        "*.linear_qkv.weight", "output_layer.weight")
"""Names of parameters that are frozen, or that AdamW updates beside Muon."""
TARGETS = ("all-linear", "q_proj", "o_proj", "experts", "lm_head", "embed_tokens", "gate_proj", "down_proj")
LARGEST = 4096
"""Ranks at most: the library makes all of their groups."""
LARGEST_EXPERTS = 400
"""Modules of experts in one drawn rank at most: the library makes each of them."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A layout, and the rank that is looked at."""

    recipe: str
    settings: tuple[str, ...]
    num_ranks: int
    rank: int

    @property
    def config(self) -> RunConfig:
        """All settings of the run."""
        return apply_settings(recipes.get(self.recipe), list(self.settings))


def draw(number: int, seed: int = 1) -> Drawn:
    """Return the layout of a number: always the same one."""
    drawn = random.Random(f"{seed} {number}")
    while True:
        result = _attempt(drawn)
        if result is not None:
            return result


def _attempt(drawn: random.Random) -> Drawn | None:
    """Return a random layout; None: it breaks a rule, or its rank holds too many modules."""
    recipe = drawn.choice(recipes.names())
    model = recipes.get(recipe).model
    sizes = {"tp": drawn.choice((1, 1, 2, 4, 8)), "pp": drawn.choice((1, 1, 2, 3, 4, 8)),
             "cp": drawn.choice((1, 1, 1, 2, 3))}
    if model.num_experts:
        sizes |= {"ep": drawn.choice((1, 2, 4, 8, 16, 32, 64)), "etp": drawn.choice((1, 1, 1, 2))}
    sizes["vpp"] = drawn.choice((1, 1, 2, 3)) if sizes["pp"] > 1 else 1
    num_ranks = (sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes.get("ep", 1) * sizes.get("etp", 1)
                 * drawn.choice((1, 2, 3, 5, 8)))
    zero1 = drawn.random() < 0.65
    layers = _layers(drawn, sizes, model.num_layers)
    # a quick check first, because most layouts break a rule
    held = model.num_moe_layers() // sizes["pp"] * (model.num_experts // sizes.get("ep", 1))
    if model.num_kv_heads % sizes["tp"] or layers is None or held > LARGEST_EXPERTS or num_ranks > LARGEST:
        return None
    if model.yarn is not None and sizes["cp"] == 3:
        return None  # the library cuts YaRN's table of angles, a power of two, in 2 x cp pieces
    settings = [f"parallel.{name}={size}" for name, size in sizes.items()]
    settings += [f"parallel.sp={str(sizes['tp'] > 1).lower()}", f"parallel.zero1={str(zero1).lower()}",
                 'data.phases=[{"name": "main", "seq_len": 3072}]', "model.max_position_tokens=4096",
                 "train.steps=1", "train.micro_batch_size=1", "train.fp8=none", "gpu.recompute_modules=[]",
                 "gpu.offload_modules=[]", "train.recompute=false", "extend.stages=[]",
                 f"train.global_batch_size={num_ranks * sizes['pp']}", "train.ramp_from_batch_size=0"]
    settings += [layers, *_training(drawn, zero1, model)]
    if drawn.random() < 0.3:
        settings.append(f"model.vocab_size={drawn.randrange(500, 200_000)}")
    found = Drawn(recipe, tuple(settings), num_ranks, drawn.randrange(num_ranks))
    try:
        return None if found.config.problems(num_ranks) else found
    except UserError:
        return None


def _layers(drawn: random.Random, sizes: dict[str, int], num_layers: int) -> str | None:
    """Return the setting of the layers of each pipeline stage: equal ones, or sometimes an uneven pipeline;
    None: there are too few layers."""
    runs = sizes["pp"] * sizes["vpp"]
    if runs == 1 or (num_layers % runs == 0 and drawn.random() < 0.5):
        return "parallel.pipeline_layout=[]"
    if runs > num_layers:
        return None
    cuts = sorted(drawn.sample(range(1, num_layers), runs - 1))
    return "parallel.pipeline_layout=" + json.dumps(
        [b - a for a, b in zip([0, *cuts], [*cuts, num_layers], strict=True)])


def _training(drawn: random.Random, zero1: bool, model: ModelConfig) -> list[str]:
    """Return settings of precision, optimizer, buckets, frozen parameters or adapters."""
    precision = drawn.choice(("bf16", "bf16", "bf16", "fp32", "fp64"))
    settings = [f"train.precision={precision}", "optim.name=" + drawn.choice(("adamw", "adamw", "muon"))]
    muon, lora = settings[-1].endswith("muon"), drawn.random() < 0.2
    if drawn.random() < 0.6:
        settings.append("parallel.overlap_grad_reduce=true")
        if drawn.random() < 0.5:
            settings.append(f"parallel.bucket_params={drawn.choice((1000, 100_000, 3_000_000, 500_000_000))}")
        if zero1 and not lora and drawn.random() < 0.5:
            settings.append("parallel.overlap_param_gather=true")
    if precision == "bf16":
        settings += drawn.choice(([], [], ["gpu.grad_dtype=bf16"]))
        if zero1:
            settings += drawn.choice(([], ["gpu.moment_dtype=bf16"], [] if muon else
                                      [f"gpu.optimizer_offload={drawn.choice((0.3, 0.77, 1))}"]))
    if zero1:
        settings += drawn.choice(([], [], ["gpu.pad_buckets=on"]))
    if lora:
        targets = drawn.sample(TARGETS, drawn.choice((1, 2, 3)))
        settings += ["optim.name=adamw", f"lora.rank={drawn.choice((1, 8, 12))}",
                     f"lora.targets={json.dumps(targets)}", f"lora.dora={drawn.choice(('true', 'false'))}"]
    elif drawn.random() < 0.35:
        lacking = ("output",) * model.tied_embeddings + ("router", "experts") * (not model.num_moe_layers())
        pattern = drawn.choice([p for p in PATTERNS if not any(word in p for word in lacking)])
        settings.append("optim.groups=" + json.dumps(
            [{"pattern": pattern, "frozen": True} if drawn.random() < 0.6 or not muon
             else {"pattern": pattern, "optimizer": "adamw"}]))
    return settings


def is_fused(layout: Drawn) -> bool:
    """Return whether Transformer Engine's modules make the model."""
    return layout.config.train.precision == "bf16"


def said(layout: Drawn, stage: int, place: StatePlace) -> States:
    """Return the bytes that `plan` predicts for the rank."""
    return StageBuffers(layout.config, layout.num_ranks, stage).count_states(place)


def compared(numbers: list[int], seed: int) -> list[dict[str, object]]:
    """Return built and predicted bytes of each layout. The process must not have created Megatron's groups
    before."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.meta_memory import count_process_memory

    rows = []
    for number in numbers:
        layout = draw(number, seed)
        made = count_process_memory(layout.config, layout.num_ranks, layout.rank)
        rows.append({"number": number, "built": dataclasses.asdict(made.states), "said": dataclasses.asdict(
            said(layout, made.stage, made.place)), "stage": made.stage})
    return rows


def worker(numbers: list[int], seed: int, double: bool) -> None:
    """Compare, and print JSON."""
    if double:
        sys.path.insert(0, str(DOUBLE))
        import transformer_engine.pytorch  # noqa: F401  (one that is not imported is hidden on a CPU)
    from megatron_sov.engine.parallel import cpu_shims

    cpu_shims.prepare_without_gpu()
    from megatron_sov.engine.model import specs

    if double:
        specs.on_gpu = lambda: True
        specs.needs_transformer_engine = lambda dtype: True
    for number in numbers:
        print(json.dumps(compared([number], seed)[0]), flush=True)


def _rows(numbers: list[int], seed: int, double: bool) -> list[dict[str, dict[str, int]]]:
    """Return the rows of one worker process."""
    command = [sys.executable, "-W", "ignore", __file__, "--seed", str(seed), "--worker",
               json.dumps([double, numbers])]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in completed.stdout.splitlines()]


def features(layout: Drawn) -> list[str]:
    """Return the features of a layout as words to count."""
    config = layout.config
    p, g = config.parallel, config.gpu
    muon = "muon" in (config.optim.name, *(group.optimizer for group in config.optim.groups))
    words = {"ZeRO-1": p.zero1, "tied embeddings": config.model.tied_embeddings, "Muon": muon,
             "prediction layer": config.model.num_mtp_layers > 0, "LoRA": config.lora.on,
             "experts": config.model.num_experts > 0, "frozen groups": any(
                 group.frozen for group in config.optim.groups), "uneven pipeline": bool(p.pipeline_layout),
             "interleaved": p.vpp > 1, "cut experts": p.etp > 1, "several buckets": p.overlap_grad_reduce,
             "bf16 gradients": g.grad_dtype == "bf16", "bf16 moments": g.moment_dtype == "bf16",
             "host memory": g.optimizer_offload > 0, "padded buckets": g.pad_buckets == "on",
             "tiny": layout.recipe.startswith("tiny-"), config.train.precision: True}
    return [word for word, holds in words.items() if holds]


def main() -> None:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        double, numbers = json.loads(args.worker)
        worker(numbers, args.seed, double)
        return
    began = time.perf_counter()
    layouts = {number: draw(number, args.seed) for number in range(args.number)}
    rows = [row for double in (True, False) for row in _rows(
        [n for n, layout in layouts.items() if is_fused(layout) == double], args.seed, double)]
    counts = Counter(word for layout in layouts.values() for word in features(layout))
    names = list(States.__annotations__)
    wrong = [row for row in rows if row["built"] != row["said"]]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
          f"seed {args.seed}; {time.perf_counter() - began:.0f} s\n")
    print(f"{len(rows)} layouts of {len({layout.recipe for layout in layouts.values()})} recipes, "
          f"{len(rows) - len(wrong)} equal in every byte, {len(wrong)} not")
    print(", ".join(f"{word} {count}" for word, count in sorted(counts.items(), key=lambda kv: -kv[1])))
    print("\n number ranks stage " + " ".join(f"{name:>15}" for name in names) + "  recipe and layout")
    for row in sorted(rows, key=lambda row: row["number"]):  # type: ignore[arg-type, return-value]
        layout = layouts[row["number"]]  # type: ignore[index]
        print(f"{row['number']:>7} {layout.num_ranks:>5} {row['stage']:>5} "
              + " ".join(f"{row['said'][name]:>15,}" for name in names)
              + ("  " if row["built"] == row["said"] else "  WRONG " + json.dumps(row["built"]) + " ")
              + layout.recipe + ": " + ", ".join(features(layout)))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
