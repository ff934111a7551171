"""Write docs/recipes.md from the recipes' source tables."""

import inspect
from pathlib import Path

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.commands.models.recipes import format_recipe_summary
from megatron_sov.model.config import apply_settings
from megatron_sov.model.recipes import RECIPES, TINY, get, sources
from megatron_sov.model.recipes.sources import DEFAULT, ValueSource, select_used
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.plan.search.recommended_layouts import RECOMMENDED, complete_layout, list_recommended
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.units import GIB

PAGE = Path(__file__).parent / "recipes.md"
TABLE_RANKS = (8, 64, 480, 512, 1024)
"""Process counts in the table of layouts."""
HEAD = """# Recipes

<!-- Written by docs/generate_recipes.py from megatron_sov/model/recipes; change it there. -->

A recipe is a configuration that names the source of each value. You start a run from a recipe, and change
it with `--set`.

```bash
megatron-sov recipes
megatron-sov recipes k-exaone-236b
megatron-sov recipes tiny-k-exaone --set train.steps=100 --json
```

The first command lists the recipes. The second prints every setting with its source. The third prints the
settings as JSON, as in your `RUN/config.json`.

| source | the value |
|---|---|
| `published` | is in a paper or report, or in its authors' code |
| `config.json` | is in the released model's config.json, or follows from its model class |
| `ours` | was not published: our choice, with the reason |
| `default` | the recipe leaves the setting as it is ([config.md](config.md)) |
| `yours` | was set by `--config` or `--set`, or by a recipe without a table |

A `tiny-` recipe has the same structure at a size for two CPU cores. You can use its short or full name
(`tiny-solar-open` is `tiny-solar-open-102b`). Values changed for the small size are `ours`.

K-EXAONE has Korean, English, Spanish, German, Japanese and Vietnamese. Its first two phases have a source per
language; English is the remaining web text.

## All recipes

| recipe | tiny recipe | stage | model and length |
|---|---|---|---|
"""
LAYOUTS = """
## Layouts for GPUs

These layouts are recommended, best first. `rl` takes the first layout that fits your process count and the
memory, with 5 % left free, with [CUDA graphs](gpu.md#cuda-graphs-for-routers) if the profile allows them, and
with `gpu.expert_spill` if twice the mean tokens on an expert-parallel rank need it ([memory.md](memory.md)).
`plan` and `submit` of other stages search for the fastest. `plan --sweep`
chose them: among layouts at most 2 % slower than the fastest, the layout with the least memory. Figures are
computed; none is from a GPU yet.

| command | use |
|---|---|
| `recipes NAME` | shows the layouts |
| `plan --cluster`, `submit --cluster` | search for the fastest layout with its kernels and dispatcher \
([plan.md](plan.md)), or for RL take it, unless you set `parallel.*`, the micro-batch or recomputation |
| `pretrain`, `extend`, `sft`, `submit` | refuse a layout that does not fit, and name the nearest \
layout that fits |

| recipe | GPU | settings | GiB per process |
|---|---|---|---|
"""
STAGES = """
## Recipes for later stages

You use `-extend` recipes with `megatron-sov extend`, from the pretrained model: the published stages in
order, each ending with the needle gate ([extend.md](extend.md)). `plan` shows steps and tokens:

```bash
megatron-sov plan solar-open-102b-extend
megatron-sov extend tiny-k-exaone-extend --from runs/pretrain --data shards --run runs/long
```

| recipe | command | remark |
|---|---|---|
| solar-open-102b-extend | `extend` | no source says when the rotations were stretched: the last stage gets \
the released YaRN 2 over 65,536 |
| vibethinker-1.5b | `extend`, then `sft` | 40,960 tokens over 16K and 32K with one slower RoPE base; then \
probe and merge the checkpoints ([sft.md](sft.md)) |
| typhoon-s-8b-opd | `rl run` | from the model that `typhoon-s-8b` fine-tuned, with `--teacher`, \
`--reward none` and `--data` |
| solar-open-102b-sft, k-exaone-236b-sft | `sft` | from the extended model |
| solar-open-102b-dpo | `prefer` | given pairs, from `solar-open-102b-rl`'s model |
| solar-open-102b-dpo-rounds | `rl run` | its own pairs, from `solar-open-102b-dpo`'s model |
| k-exaone-236b-grouper | `prefer` | GrouPER, from `k-exaone-236b-rl`'s model |
| typhoon-s-4b-legal, -agent | `rl run`, or the three jobs ([rl.md](rl.md)) | InK-GRPO |
| vibethinker-1.5b-math-16k, -math-32k, -code | the same | MGPO; set its lambda and clip, which were not \
published |
| solar-open-102b-rl | the same | GSPO |
| k-exaone-236b-rl | the same | AGAPO with a frozen router; set its ratio bound, which was not \
published |

```sh
megatron-sov rl run typhoon-s-4b-legal --from work/qwen3-4b-2507 --data work/laws --prompts questions.jsonl \\
  --reward judge --reward-set endpoint=http://localhost:8000/v1 --reward-set model=my-judge \\
  --store work/store --run runs/legal
```

## Where values come from

All other settings have the default. `*` matches any text.
"""
TAIL = """
## Add a recipe

You need a function in `megatron_sov/model/recipes/` that returns a `RunConfig`, a source table, and an
entry for both in `megatron_sov/model/recipes/__init__.py`. Keys in the table are dotted settings, and the
last match counts. So a derived recipe (`derive`) lists only its changes. A test fails if a
value has no source, if an entry matches nothing, or if a value differs from its config.json.
"""


def build_page() -> str:
    tables = "".join(format_sources(name) for name in RECIPES if name not in TINY)
    return HEAD + format_overview() + LAYOUTS + format_layouts() + STAGES + tables + TAIL


def format_overview() -> str:
    """Format a row for each recipe in `RECIPES` except `TINY`."""
    tiny_names = {full: tiny for tiny, full in TINY.items()}
    rows = []
    for name in RECIPES:
        if name not in TINY:
            docstring = inspect.getdoc(RECIPES[name].build) or ""
            summary = " ".join(docstring.partition("\n\n")[0].split()).removeprefix("Return ").rstrip(".")
            rows.append(f"| `{name}` | `{tiny_names[name]}` | {summary} | "
                        f"{format_recipe_summary(get(name))} |\n")
    return "".join(rows)


def format_layouts() -> str:
    """Format a row for each recommended layout."""
    rows = []
    for name in RECOMMENDED:
        config = get(name)
        for kind, gpu in CHIPS.items():
            for layout in list_recommended(config, kind):
                fitting = {ranks: complete_layout(config, layout, ranks, kind) for ranks in TABLE_RANKS}
                runs = {ranks: apply_settings(config, list(found)) for ranks, found in fitting.items()
                        if found is not None}
                memory_gib = {ranks: find_fullest_stage(run, ranks)[1].total / GIB
                              for ranks, run in runs.items()}
                settings = ", ".join(f"`{setting}`" for setting in layout) or "its own"
                sizes = ", ".join(f"{gib:.0f} on {ranks:,}" for ranks, gib in memory_gib.items())
                rows.append(f"| `{name}` | {gpu.name} | {settings} | {sizes} |\n")
    return "".join(rows)


def format_sources(name: str) -> str:
    """Format a recipe's table: a row per source, with the settings from that source."""
    keys: dict[ValueSource, list[str]] = {}
    for key, source in select_used(get(name), sources(name)).items():
        if source != DEFAULT:
            keys.setdefault(source, []).append(f"`{key}`")
    rows = "".join(f"| {', '.join(source_keys)} | {source.kind} | {source.where} |\n"
                   for source, source_keys in keys.items())
    return f"\n### {name}\n\n| settings | source | where, or why |\n|---|---|---|\n{rows}"


if __name__ == "__main__":
    write_atomically(PAGE, build_page())
