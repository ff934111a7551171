"""Write docs/memory.md: memory per process at 262,144 tokens, computed by `build_account`."""

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.base.artifacts import write_atomically
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.gpu_capacity import (
    find_fullest_stage, find_imbalance_limit, get_usable_bytes)
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.plan.footprint.stage_parameters import BF16_BYTES, FLOAT32_BYTES
from megatron_sov.plan.pages.layout_report import format_layout as format_layout_choice
from megatron_sov.plan.search.recommended_layouts import RECOMMENDED
from megatron_sov.plan.search.space import get_current_choice
from megatron_sov.plan.speed.workload import ModelShape, build_shape
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.units import GIB

PAGE = Path(__file__).parent / "memory.md"
SEQ_LEN = 262_144
LAYOUTS = (
    ("solar-open-102b", 128, {"tp": 4, "sp": True, "cp": 8, "ep": 32}),
    ("solar-open-102b", 256, {"tp": 8, "sp": True, "cp": 16, "ep": 64}),
    ("solar-open-102b", 256, {"tp": 4, "sp": True, "cp": 16, "ep": 64, "pp": 2}),
    ("k-exaone-236b", 256, {"tp": 8, "sp": True, "cp": 8, "ep": 64}),
    ("k-exaone-236b", 512, {"tp": 8, "sp": True, "cp": 16, "ep": 128}),
    ("k-exaone-236b", 512, {"tp": 8, "sp": True, "cp": 16, "ep": 64, "pp": 4}),
)
COLUMNS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer",
           "layer_inputs": "layer inputs", "one_layer": "one layer", "head": "head", "imbalance": "imbalance",
           "angles": "angles", "nccl": "NCCL", "fragmentation": "gaps"}
"""Field of `MemoryAccount` -> column; other fields are about 0 and only in `total`."""
HEAD = f"""# Memory at {SEQ_LEN:,} tokens

<!-- Written by docs/generate_memory.py; change it there. -->

GiB for the process that needs most, as `megatron-sov plan` computes it. The run uses bf16, ZeRO-1, one sample
per micro-batch, and recomputes every layer.

| columns | how they are counted |
|---|---|
| weights, gradients, optimizer | exactly: compared with megatron-core on random layouts for all recipes \
(`benchmarks/results/plan_bytes.txt`) |
| layer inputs | the input of every layer and micro-batch in flight |
| one layer, head | one layer's activations with gradients; one chunk's logits with gradients. The \
larger item counts |
| imbalance | estimate: the fullest expert-parallel rank has `gpu.expert_imbalance` = 2 times the mean \
tokens |
| NCCL, gaps | estimates: each communicator's buffers, the allocator's gaps \
(`megatron_sov/plan/footprint/memory.py`) |

Activations are compared with the tensors that autograd saves in whole steps
(`benchmarks/results/plan_activations.txt`).
Keep 5 % of GPU memory free for the CUDA context and library workspaces.

| recipe | processes | layout | stage | {" | ".join(COLUMNS.values())} | sum |
|---|---|---|---|{"---|" * len(COLUMNS)}---|
"""


CACHE_TOKENS = (8192, 32_768, SEQ_LEN)
"""Sequence lengths in the second table."""
CACHE_RECIPES = ("solar-open-102b", "k-exaone-236b", "qwen3-moe-30b", "qwen3-8b")
CACHES = f"""
## Keys and values during generation

During generation, global layers store keys and values for every token, sliding layers for a window. GiB per
sequence in bf16, over all processes that share it:

| recipe | {" | ".join(f"{tokens:,} tokens" for tokens in CACHE_TOKENS)} |
|---|{"---|" * len(CACHE_TOKENS)}
"""


LOADS = (1.0, 1.2, 1.5, 2.0, 3.0)
"""Tokens on the busiest expert-parallel process, relative to the mean."""
NUM_RANKS = (480, 512, 64)
"""Numbers of processes of `format_room`; a layout has the first that is valid."""
TABLE_HEAD = f"""\
| recipe | GPU | GPUs | layout | usable | {" | ".join(f"{load:g}x" for load in LOADS)} | fits up to \
| spill, 2x | spill, 3x |
|---|---|---|---|---|{"---|" * len(LOADS)}---|---|---|
"""
ROOM = f"""
## Experts with more tokens than the mean

No token is dropped. Untrained routers and a new data mix send some experts 1.5 to 3 times the mean tokens.
`plan`, `submit` and a run print the largest load that fits, and refuse layouts below `gpu.expert_imbalance`
(2). With `gpu.expert_spill=1.2`, activations of overloaded layers wait in host memory, and the run slows
down instead of running out of memory; recommended layouts get this setting if they need it. A run writes an
`alarm` event if the busiest process exceeds `gpu.expert_imbalance` ([guards.md](guards.md)).

GiB of the fullest process of the first recommended layout, and the largest load that fits. 95 % of the GPU's
memory are usable. The last two columns have `gpu.expert_spill=1.2`.
[plan_imbalance.txt](../benchmarks/results/plan_imbalance.txt) has every recommended layout.

{TABLE_HEAD}"""


def build_page() -> str:
    return (HEAD + "".join(format_layout(*layout) for layout in LAYOUTS) + CACHES
            + "".join(format_cache(recipe) for recipe in CACHE_RECIPES) + ROOM + "".join(iter_room_rows(1)))


def iter_room_rows(max_layouts: int) -> Iterator[str]:
    """Yield a row for each of the first `max_layouts` in `RECOMMENDED` with expert parallelism."""
    for recipe, layouts_of_gpus in RECOMMENDED.items():
        base = recipes.get(recipe)
        for gpu, layouts in layouts_of_gpus.items():
            for layout in layouts[:max_layouts]:
                config = apply_settings(base, list(layout))
                if config.parallel.ep > 1:
                    yield format_room(config, gpu)


def format_room(config: RunConfig, gpu: str) -> str:
    """Format a row of `TABLE_HEAD`: bytes at each of `LOADS`, and `find_imbalance_limit`."""
    num_ranks = next(count for count in NUM_RANKS if not config.problems(count))
    spilled = apply_settings(config, ["gpu.expert_spill=1.2"])
    sizes = [f"{find_load_bytes(config, num_ranks, load) / GIB:.0f}" for load in LOADS]
    limit = find_imbalance_limit(config, num_ranks, CHIPS[gpu])
    sizes.append({math.inf: "any", 0.0: "none"}.get(limit, f"{limit:.2f}"))
    sizes += [f"{find_load_bytes(spilled, num_ranks, load) / GIB:.0f}" for load in LOADS[-2:]]
    text = format_layout_choice(get_current_choice(config))
    usable = f"{get_usable_bytes(CHIPS[gpu]) / GIB:.0f}"
    return f"| `{config.recipe}` | {gpu} | {num_ranks} | {text} | {usable} | {' | '.join(sizes)} |\n"


def find_load_bytes(config: RunConfig, num_ranks: int, load: float) -> int:
    """Return the bytes of the fullest process at `gpu.expert_imbalance` = `load`."""
    loaded = apply_settings(config, [f"gpu.expert_imbalance={load}"])
    return find_fullest_stage(loaded, num_ranks)[1].total


def format_layout(recipe: str, num_ranks: int, layout: dict[str, int | bool]) -> str:
    """Format a row for the pipeline stage with most memory."""
    changes = [f"parallel.{name}={value}" for name, value in layout.items()]
    config = apply_settings(recipes.get(recipe), [
        *changes, "train.precision=bf16", "train.fp8=none", "parallel.zero1=true",
        f"model.max_position_tokens={SEQ_LEN}"])
    accounts = [build_account(config, num_ranks, stage, SEQ_LEN) for stage in range(config.parallel.pp)]
    account = max(accounts, key=lambda account: account.total)
    layout_text = ", ".join(name if value is True else f"{name} {value}" for name, value in layout.items())
    sizes = [*(getattr(account, name) for name in COLUMNS), account.total]
    return (f"| `{recipe}` | {num_ranks} | {layout_text} | {accounts.index(account) + 1} | "
            + " | ".join(f"{size / GIB:.1f}" for size in sizes) + " |\n")


def format_cache(recipe: str) -> str:
    """Format a row for keys and values."""
    shape = build_shape(recipes.get(recipe).model)
    sizes = [compute_cache_bytes(shape, tokens) / GIB for tokens in CACHE_TOKENS]
    return f"| `{recipe}` | " + " | ".join(f"{size:.2f}" for size in sizes) + " |\n"


def compute_cache_bytes(shape: ModelShape, tokens: int) -> float:
    """Return the bf16 bytes per sequence over all layers.

    Global layers store every token, sliding layers a window, latent attention one vector for all heads, and
    linear attention a state in float32.
    """
    width = (shape.kv_lora_rank + shape.rope_head_dim if shape.kv_lora_rank
             else 2 * shape.num_kv_heads * shape.head_dim)
    num_stored = ((shape.num_attention_layers - shape.num_window_layers) * tokens
                  + sum(layers * min(tokens, window) for window, layers in shape.windowed))
    states = 0 if shape.linear is None else shape.num_linear_layers * shape.linear.cached_size
    return num_stored * width * BF16_BYTES + states * FLOAT32_BYTES


if __name__ == "__main__":
    write_atomically(PAGE, build_page())
