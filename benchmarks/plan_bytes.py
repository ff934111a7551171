"""Bytes of weights, gradients and optimizer states that `plan` predicts, compared with those that training
allocates: random valid layouts of all recipes, one rank of the whole world, on meta tensors.

Usage: python benchmarks/plan_bytes.py [--number 240] [--seed 1] > benchmarks/results/plan_bytes.txt

For each layout one process builds the library's modules, data-parallel buffers and optimizer as a random rank
in a fake group of all ranks (`tests/meta_memory.py`). Every byte is compared: padding of ZeRO-1 buckets and
vocabularies, copies of tied embeddings, frozen parameters, and the parameter ranges that this rank updates
with AdamW or Muon, on the device or in host memory. bf16 models consist of Transformer Engine modules, from
the tests' double with the same parameters; other models consist of torch modules.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from measurement import describe_machine

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, RunConfig, apply_settings
from megatron_sov.model.process_memory import StatePlace, States
from megatron_sov.plan.footprint.states import StageBuffers

DOUBLE = Path(__file__).parents[1] / "tests" / "te_double"
PATTERNS = ("*router.weight", "embedding.*", "decoder.layers.0.*", "*experts.linear_fc2.weight",
            "*norm.weight", "*.linear_qkv.weight", "output_layer.weight")
"""Names of parameters that are frozen, or updated by AdamW in a Muon run."""
TARGETS = ("all-linear", "q_proj", "o_proj", "experts", "lm_head", "embed_tokens", "gate_proj", "down_proj")
"""Values of `lora.targets`; a layout gets some of them."""
MAX_RANKS = 4096
"""The library creates the groups of all ranks."""
MAX_LOCAL_EXPERTS = 400
"""The library creates a module for each expert of the rank."""


@dataclasses.dataclass(frozen=True)
class DrawnLayout:
    """A random layout, and one of its ranks."""

    recipe: str
    settings: tuple[str, ...]
    num_ranks: int
    rank: int

    @property
    def config(self) -> RunConfig:
        """All settings of the run."""
        return apply_settings(recipes.get(self.recipe), list(self.settings))


def draw_layout(number: int, seed: int = 1) -> DrawnLayout:
    """Return the random layout with this number; a function of number and seed."""
    generator = random.Random(f"{seed} {number}")
    while True:
        result = try_draw(generator)
        if result is not None:
            return result


def try_draw(generator: random.Random) -> DrawnLayout | None:
    """Return a random layout, or None if it breaks a rule or its rank has too many modules."""
    recipe = generator.choice(recipes.names())
    model = recipes.get(recipe).model
    sizes = {"tp": generator.choice((1, 1, 2, 4, 8)), "pp": generator.choice((1, 1, 2, 3, 4, 8)),
             "cp": generator.choice((1, 1, 1, 2, 3))}
    if model.num_experts:
        sizes |= {"ep": generator.choice((1, 2, 4, 8, 16, 32, 64)), "etp": generator.choice((1, 1, 1, 2))}
    sizes["vpp"] = generator.choice((1, 1, 2, 3)) if sizes["pp"] > 1 else 1
    num_ranks = (sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes.get("ep", 1) * sizes.get("etp", 1)
                 * generator.choice((1, 2, 3, 5, 8)))
    zero1 = generator.random() < 0.65
    layers = draw_pipeline(generator, sizes, model.num_layers)
    # a quick check first, because most layouts break a rule
    num_local_experts = model.num_moe_layers() // sizes["pp"] * (model.num_experts // sizes.get("ep", 1))
    if model.num_kv_heads % sizes["tp"] or layers is None:
        return None
    if num_local_experts > MAX_LOCAL_EXPERTS or num_ranks > MAX_RANKS:
        return None
    if model.yarn is not None and sizes["cp"] == 3:
        return None  # the library splits YaRN's table, whose length is a power of two, into 2 x cp chunks
    settings = [f"parallel.{name}={size}" for name, size in sizes.items()]
    settings += [f"parallel.sp={str(sizes['tp'] > 1).lower()}", f"parallel.zero1={str(zero1).lower()}",
                 'data.phases=[{"name": "main", "seq_len": 3072}]', "model.max_position_tokens=4096",
                 "train.steps=1", "train.micro_batch_size=1", "train.fp8=none", "gpu.recompute_modules=[]",
                 "gpu.offload_modules=[]", "train.recompute=false", "extend.stages=[]",
                 f"train.global_batch_size={num_ranks * sizes['pp']}", "train.ramp_from_batch_size=0"]
    settings += [layers, *draw_training_settings(generator, zero1, model)]
    if generator.random() < 0.3:
        settings.append(f"model.vocab_size={generator.randrange(500, 200_000)}")
    layout = DrawnLayout(recipe, tuple(settings), num_ranks, generator.randrange(num_ranks))
    try:
        return None if layout.config.problems(num_ranks) else layout
    except UserError:
        return None


def draw_pipeline(generator: random.Random, sizes: dict[str, int], num_layers: int) -> str | None:
    """Return the setting of equal stages or of a random uneven pipeline; None: there are too few layers."""
    runs = sizes["pp"] * sizes["vpp"]
    if runs == 1 or (num_layers % runs == 0 and generator.random() < 0.5):
        return "parallel.pipeline_layout=[]"
    if runs > num_layers:
        return None
    cuts = sorted(generator.sample(range(1, num_layers), runs - 1))
    return "parallel.pipeline_layout=" + json.dumps(
        [b - a for a, b in zip([0, *cuts], [*cuts, num_layers], strict=True)])


def draw_training_settings(generator: random.Random, zero1: bool, model: ModelConfig) -> list[str]:
    """Return settings of precision, optimizer, buckets, frozen parameters or adapters."""
    precision = generator.choice(("bf16", "bf16", "bf16", "fp32", "fp64"))
    settings = [f"train.precision={precision}", "optim.name=" + generator.choice(("adamw", "adamw", "muon"))]
    muon, lora = settings[-1].endswith("muon"), generator.random() < 0.2
    if generator.random() < 0.6:
        settings.append("parallel.overlap_grad_reduce=true")
        if generator.random() < 0.5:
            bucket_params = generator.choice((1000, 100_000, 3_000_000, 500_000_000))
            settings.append(f"parallel.bucket_params={bucket_params}")
        if zero1 and not lora and generator.random() < 0.5:
            settings.append("parallel.overlap_param_gather=true")
    if precision == "bf16":
        settings += generator.choice(([], [], ["gpu.grad_dtype=bf16"]))
        if zero1:
            offload = f"gpu.optimizer_offload={generator.choice((0.3, 0.77, 1))}"
            settings += generator.choice(([], ["gpu.moment_dtype=bf16"], [] if muon else [offload]))
    if zero1:
        settings += generator.choice(([], [], ["gpu.pad_buckets=on"]))
    if lora:
        targets = generator.sample(TARGETS, generator.choice((1, 2, 3)))
        settings += ["optim.name=adamw", f"lora.rank={generator.choice((1, 8, 12))}",
                     f"lora.targets={json.dumps(targets)}",
                     f"lora.dora={generator.choice(('true', 'false'))}"]
    elif generator.random() < 0.35:
        missing: list[str] = []
        if model.tied_embeddings:
            missing.append("output")
        if not model.num_moe_layers():
            missing += ["router", "experts"]
        pattern = generator.choice([p for p in PATTERNS if not any(word in p for word in missing)])
        is_frozen = generator.random() < 0.6 or not muon
        rule = {"frozen": True} if is_frozen else {"optimizer": "adamw"}
        settings.append("optim.groups=" + json.dumps([{"pattern": pattern, **rule}]))
    return settings


def is_fused(layout: DrawnLayout) -> bool:
    """Return whether the model consists of Transformer Engine modules."""
    return layout.config.train.precision == "bf16"


def predict_states(layout: DrawnLayout, stage: int, place: StatePlace) -> States:
    """Return the bytes that `plan` predicts for the rank."""
    return StageBuffers(layout.config, layout.num_ranks, stage).count_states(place)


def compare_states(numbers: list[int], seed: int) -> list[dict[str, object]]:
    """Return built and predicted bytes of each layout. The process must not have created Megatron's groups
    before."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.meta_memory import count_process_memory

    rows = []
    for number in numbers:
        layout = draw_layout(number, seed)
        counted = count_process_memory(layout.config, layout.num_ranks, layout.rank)
        predicted = predict_states(layout, counted.stage, counted.place)
        rows.append({"number": number, "built": dataclasses.asdict(counted.states),
                     "predicted": dataclasses.asdict(predicted), "stage": counted.stage})
    return rows


def compare_and_print(numbers: list[int], seed: int, double: bool) -> None:
    """Compare the layouts with these numbers, and print a line of JSON for each."""
    if double:
        sys.path.insert(0, str(DOUBLE))
        import transformer_engine.pytorch  # noqa: F401  (cpu_shims hides the library unless it is imported)
    from layout_proof import cpu_shims

    cpu_shims.prepare_without_gpu()
    from megatron_sov.engine.model import specs

    if double:
        specs.on_gpu = lambda: True
        specs.needs_transformer_engine = lambda dtype: True
    for number in numbers:
        print(json.dumps(compare_states([number], seed)[0]), flush=True)


def run_worker(numbers: list[int], seed: int, double: bool) -> list[dict[str, dict[str, int]]]:
    """Return the rows of one worker process."""
    command = [sys.executable, "-W", "ignore", __file__, "--seed", str(seed), "--worker",
               json.dumps([double, numbers])]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in completed.stdout.splitlines()]


def list_features(layout: DrawnLayout) -> list[str]:
    """Return the features of a layout as words to count."""
    config = layout.config
    parallel, gpu, groups = config.parallel, config.gpu, config.optim.groups
    words = {"ZeRO-1": parallel.zero1, "tied embeddings": config.model.tied_embeddings,
             "Muon": "muon" in (config.optim.name, *(group.optimizer for group in groups)),
             "prediction layer": config.model.num_mtp_layers > 0, "LoRA": config.lora.on,
             "experts": config.model.num_experts > 0, "frozen groups": any(group.frozen for group in groups),
             "uneven pipeline": bool(parallel.pipeline_layout), "interleaved": parallel.vpp > 1,
             "cut experts": parallel.etp > 1, "several buckets": parallel.overlap_grad_reduce,
             "bf16 gradients": gpu.grad_dtype == "bf16", "bf16 moments": gpu.moment_dtype == "bf16",
             "host memory": gpu.optimizer_offload > 0, "padded buckets": gpu.pad_buckets == "on",
             "tiny": layout.recipe.startswith("tiny-"), config.train.precision: True}
    return [word for word, holds in words.items() if holds]


def main() -> None:
    """Draw layouts, compare their bytes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        double, numbers = json.loads(args.worker)
        compare_and_print(numbers, args.seed, double)
        return
    begin_s = time.perf_counter()
    layouts = {number: draw_layout(number, args.seed) for number in range(args.number)}
    rows = []
    for double in (True, False):
        numbers = [number for number, layout in layouts.items() if is_fused(layout) == double]
        rows += run_worker(numbers, args.seed, double)
    counts = Counter(word for layout in layouts.values() for word in list_features(layout))
    names = list(States.__annotations__)
    wrong = [row for row in rows if row["built"] != row["predicted"]]
    print(f"{describe_machine()}; seed {args.seed}; {time.perf_counter() - begin_s:.0f} s\n")
    print(f"{len(rows)} layouts of {len({layout.recipe for layout in layouts.values()})} recipes, "
          f"{len(rows) - len(wrong)} equal in every byte, {len(wrong)} not")
    print(", ".join(f"{word} {count}" for word, count in sorted(counts.items(), key=lambda kv: -kv[1])))
    print("\n number ranks stage " + " ".join(f"{name:>15}" for name in names) + "  recipe and layout")
    for row in sorted(rows, key=lambda row: row["number"]):  # type: ignore[arg-type, return-value]
        layout = layouts[row["number"]]  # type: ignore[index]
        print(f"{row['number']:>7} {layout.num_ranks:>5} {row['stage']:>5} "
              + " ".join(f"{row['predicted'][name]:>15,}" for name in names)
              + ("  " if row["built"] == row["predicted"] else "  WRONG " + json.dumps(row["built"]) + " ")
              + layout.recipe + ": " + ", ".join(list_features(layout)))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
