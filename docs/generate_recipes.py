"""Writes docs/recipes.md from the recipes' own tables of sources: `python docs/generate_recipes.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

from megatron_sov.base.artifacts import atomic_write
from megatron_sov.commands.models.recipes import summary
from megatron_sov.model.recipes import RECIPES, TINY, get, sources
from megatron_sov.model.recipes.sources import DEFAULT, ValueSource, in_effect
from megatron_sov.plan.search import recommended
from megatron_sov.plan.search.recommended import RECOMMENDED
from megatron_sov.work.clusters.chips import CHIPS

PAGE = Path(__file__).parent / "recipes.md"
HEAD = """# Recipes

<!-- Written by docs/generate_recipes.py from megatron_sov/model/recipes; change it there. -->

A recipe is a short Python function that returns a configuration, and a table that says where each value
comes from.

```bash
megatron-sov recipes
megatron-sov recipes k-exaone-236b
megatron-sov recipes tiny-k-exaone --set train.steps=100 --json
```

The first command lists them, the second one prints every setting of one with its source, the third one
prints the settings as JSON, as `--set` leaves them, which is what `RUN/config.json` will hold.

| source | the value |
|---|---|
| `published` | stands in a paper or report, or in its authors' code |
| `config.json` | stands in the config.json of the released model, or follows from its model class |
| `ours` | was published by nobody: our choice, with a word why |
| `default` | the recipe leaves the setting as it is ([config.md](config.md)) |
| `yours` | was set by `--set`, or by a recipe without a table |

`tiny-` before a recipe's name is the same structure at a size for two CPU cores, under the name in the
table below or the whole one (`tiny-solar-open` is `tiny-solar-open-102b`). What shrinking changes is
`ours`, the rest comes from where the big recipe has it.

K-EXAONE speaks six languages: Korean, English, Spanish, German, Japanese and Vietnamese. Its first two
phases have a source for each of them but English, which is the rest of the web.

## What there is

| recipe | tiny | is | and has |
|---|---|---|---|
"""
LAYOUTS = """
## Layouts for GPUs

What a process needs of its GPU's memory depends on the layout. These are recommended, best first; of a
recipe's the first one serves that so many processes can have (a batch has to divide) and that fits, with 5 %
of the memory kept for what the account of [memory.md](memory.md) leaves out. `recipes NAME` shows them too,
`plan --cluster` and `submit --cluster` take the one for the cluster's GPUs where nobody has set `parallel.*`,
the micro-batch or what is recomputed, and `pretrain`, `extend`, `sft` and `submit` refuse a layout that does
not fit and name the nearest that does. They are what `plan --sweep` finds: of the layouts within 2 % of the
fastest the one that needs least memory. Figures are those of the account; none of these layouts has run on a
GPU yet.

| recipe | GPU | settings | GiB of a process |
|---|---|---|---|
"""
STAGES = """
`-extend` recipes are for `megatron-sov extend`, from the pretrained model: the published stages one after
the other, with long documents and rehearsal, each behind the needle gate ([extend.md](extend.md)). `plan`
shows the steps and tokens of both:

```bash
megatron-sov plan solar-open-102b-extend
megatron-sov extend tiny-k-exaone-extend --from runs/pretrain --data shards --run runs/long
```

No source at hand says at which stage Solar Open's rotations were stretched: it is pretrained and brought to
32K with plain ones, and gets the released ones, YaRN 2 over 65,536, with the last stage.
`vibethinker-1.5b` is two commands: `extend` makes the base ready for 40,960 tokens, over 16K and 32K with one
slower base of the rotations, `sft` goes on from there; its checkpoints are probed and merged as in
[ssp.md](ssp.md). `typhoon-s-8b-opd` is for `distill`, from what `typhoon-s-8b` has fine-tuned;
`solar-open-102b-dpo` is for a round of `prefer`.

Runs of reinforcement learning are for `rl run`, or for `rl generate`, `rl reward` and `rl train`
([rl.md](rl.md)), from the model that was fine-tuned: `typhoon-s-4b-legal` and `-agent` (InK-GRPO),
`vibethinker-1.5b-math-16k`, `-math-32k` and `-code` (MGPO), `solar-open-102b-rl` (GSPO), `k-exaone-236b-rl`
(AGAPO, with a router that stays as it is). MGPO's lambda and VibeThinker's clip were not published, nor the
bound of K-EXAONE's ratios: these runs are refused until `--set` says them.

```sh
megatron-sov rl run typhoon-s-4b-legal --from work/qwen3-4b-2507 --data work/laws --prompts questions.jsonl \\
  --reward judge --store work/store --run runs/legal
```

## Where values come from

What no table names is the default. `*` stands for any text.
"""
TAIL = """
## Add a recipe

A function in `megatron_sov/model/recipes/` that returns a `RunConfig`, a table of sources beside it, and an
entry in `megatron_sov/model/recipes/__init__.py`, which names both. Keys of the table are dotted settings;
the last one that matches holds, so that a recipe derived from another one (`derive`) says only what it
changes. A test fails for every value that a recipe sets and no entry names, for entries that name nothing,
and for a value that is said to stand in a config.json and differs from it.
"""


def overview() -> str:
    """Return a line for every recipe but the tiny ones."""
    tiny = {big: name for name, big in TINY.items()}
    rows = []
    for name in (n for n in RECIPES if n not in TINY):
        first = " ".join((inspect.getdoc(RECIPES[name].build) or "").partition("\n\n")[0].split())
        about = first.removeprefix("Return ").rstrip(".")
        rows.append(f"| `{name}` | `{tiny[name]}` | {about} | {summary(get(name))} |\n")
    return "".join(rows)


def table(name: str) -> str:
    """Return the sources of one recipe, each with all settings that it gives."""
    keys: dict[ValueSource, list[str]] = {}
    for key, source in in_effect(get(name), sources(name)).items():
        if source != DEFAULT:
            keys.setdefault(source, []).append(f"`{key}`")
    rows = "".join(f"| {', '.join(found)} | {source.kind} | {source.where} |\n"
                   for source, found in keys.items())
    return f"\n### {name}\n\n| settings | source | where, or why |\n|---|---|---|\n{rows}"


def layouts() -> str:
    """Return a line for each recommended layout of a recipe."""
    rows = []
    for name in RECOMMENDED:
        config = get(name)
        for kind, gpu in CHIPS.items():
            for layout in recommended.layouts(config, kind):
                needs = recommended.memory_gib(config, layout, kind)
                rows.append(f"| `{name}` | {gpu.name} | "
                            f"{', '.join(f'`{s}`' for s in layout) or 'its own'} | "
                            f"{', '.join(f'{n:.0f} on {ranks:,}' for ranks, n in needs.items())} |\n")
    return LAYOUTS + "".join(rows)


def page() -> str:
    """Return the whole page."""
    tables = "".join(table(name) for name in RECIPES if name not in TINY)
    return HEAD + overview() + layouts() + STAGES + tables + TAIL


if __name__ == "__main__":
    atomic_write(PAGE, page())
