"""Writes docs/memory.md: what one process needs at 262,144 tokens, from the built modules: `python
docs/generate_memory.py`."""

from __future__ import annotations

from pathlib import Path

from megatron_sov import recipes
from megatron_sov.artifacts import atomic_write
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.mcore.model.meta import built_stage
from megatron_sov.plan.memory import Account, account

PAGE = Path(__file__).parent / "memory.md"
SEQ_LEN = 262_144
GIB = 1 << 30
LAYOUTS = (
    ("solar-open-102b", 128, {"tp": 4, "sp": True, "cp": 8, "ep": 32}),
    ("solar-open-102b", 256, {"tp": 8, "sp": True, "cp": 16, "ep": 64}),
    ("solar-open-102b", 256, {"tp": 4, "sp": True, "cp": 16, "ep": 64, "pp": 2}),
    ("k-exaone-236b", 256, {"tp": 8, "sp": True, "cp": 8, "ep": 64}),
    ("k-exaone-236b", 512, {"tp": 8, "sp": True, "cp": 16, "ep": 128}),
    ("k-exaone-236b", 512, {"tp": 8, "sp": True, "cp": 16, "ep": 64, "pp": 4}),
)
HEAD = f"""# Memory at {SEQ_LEN:,} tokens

<!-- Written by docs/generate_memory.py; change it there. -->

GiB of the fullest process, in bf16 with ZeRO-1, micro-batches of one sample and every layer recomputed.
Parameters are counted on the modules that training builds, on meta tensors; activations are an account
(`megatron_sov/plan/memory.py`): the input of every layer, the inside of one layer with its gradients, the
logits of one chunk and the gradient of the head. Routing is taken to be even. What the allocator, the
communication library and the CUDA context take comes on top.

| recipe | processes | layout | stage | weights | gradients | optimizer | layer inputs | one layer \
| head | sum |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def settings_of(recipe: str, layout: dict[str, int | bool]) -> RunConfig:
    """Return a recipe at a layout and the length of the page."""
    changes = [f"parallel.{name}={value}" for name, value in layout.items()]
    return apply_settings(recipes.get(recipe), [*changes, "train.precision=bf16", "parallel.zero1=true",
                                                f"model.max_position_tokens={SEQ_LEN}"])


def fullest(recipe: str, num_ranks: int, layout: dict[str, int | bool]) -> tuple[int, Account]:
    """Return the pipeline stage that needs most, and its account."""
    config = settings_of(recipe, layout)
    accounts = [account(config, built_stage(config, num_ranks, i).params, num_ranks, i, SEQ_LEN)
                for i in range(config.parallel.pp)]
    stage = max(range(len(accounts)), key=lambda i: accounts[i].total)
    return stage, accounts[stage]


def row(recipe: str, num_ranks: int, layout: dict[str, int | bool]) -> str:
    """Return one line of the table."""
    stage, a = fullest(recipe, num_ranks, layout)
    said = ", ".join(name if value is True else f"{name} {value}" for name, value in layout.items())
    figures = (a.weights, a.gradients, a.optimizer, a.layer_inputs, a.one_layer, a.head, a.total)
    return (f"| `{recipe}` | {num_ranks} | {said} | {stage + 1} | "
            + " | ".join(f"{v / GIB:.1f}" for v in figures) + " |\n")


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(row(*layout) for layout in LAYOUTS)


if __name__ == "__main__":
    atomic_write(PAGE, page())
