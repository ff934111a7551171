"""What a run would do: sources, steps, folders, what stands already, and why the rest is done anew."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.pipeline.addresses import REASONS_FILE
from data_prep.pipeline.finish import is_complete
from data_prep.pipeline.plan import Layer, Plan, SourcePlan
from data_prep.pipeline.reuse import reusable
from data_prep.pipeline.running import open_tasks
from data_prep.pipeline.tasks import Stage, layer_of, stages, tasks
from megatron_sov.documents.strict_json import changed_values
from megatron_sov.sealed import try_read_json

MAX_REASONS = 3


def describe(plan: Plan, output: Path) -> str:
    """Return the plan in lines."""
    lines = [f"{plan.pipeline.name}: {_many(len(plan.sources), 'source')}, {_many(len(plan.steps), 'step')}"]
    for source in plan.sources:
        lines.append(f"  source {source.settings.name}: {_many(source.num_files, 'file')}, "
                     f"{source.raw_bytes / 1e6:,.1f} MB, {_many(len(source.shards), 'shard')}")
        lines += [f"    {sentence}" for sentence in source.told]
    if is_complete(plan, output):
        lines.append(f"{output}: complete from before, nothing is done")
        return "\n".join(lines)
    taken = Counter(found.layer.folder for found in reusable(plan, output))
    for stage in stages(plan):
        lines += _stage_lines(plan, stage, output, taken)
    if plan.pipeline.pack is not None:
        lines.append(f"  pack: {plan.pipeline.pack.tokenizer}")
    return "\n".join(lines)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _stage_lines(plan: Plan, stage: Stage, output: Path, taken: Counter[str]) -> Iterator[str]:
    layers = [(source, layer) for source in plan.sources if (layer := layer_of(source, stage))]
    total, left = len(tasks(plan, stage)), len(open_tasks(plan, stage, output))
    if stage.index < 0:
        left -= sum(taken[layer.folder] for _, layer in layers)
    what = "task" if stage.index >= 0 else "shard"
    yield f"  {stage.name}: {_many(total, what)}, {total - left:,} done, {left:,} to do"
    if stage.index >= 0:
        return
    for source, layer in layers:
        done = sum(layer.rows(output, shard).exists() for shard in source.shards)
        why = "; ".join(_why(source, layer, output)) if done < len(source.shards) else ""
        yield (f"    {layer.folder}: {done} of {len(source.shards)} done"
               + (f", {taken[layer.folder]} as an earlier run has them" if taken[layer.folder] else "")
               + (f"; anew for {why}" if why else ""))


def _why(source: SourcePlan, layer: Layer, output: Path) -> list[str]:
    """Return what differs from the newest folder of the same step of a source; empty: there is none, or this
    one has been begun."""
    folder = output / layer.folder
    others = [file for file in folder.parent.glob(f"*-{layer.kind}-*/{REASONS_FILE}")
              if file.parent != folder and any(file.parent.glob("[0-9]*"))]
    if not others or ((folder / REASONS_FILE).is_file() and any(folder.glob("[0-9]*"))):
        return []
    newest = max(others, key=lambda file: file.stat().st_mtime_ns)
    if (before := try_read_json(newest)) is None:
        return []
    now = json.loads(json.dumps(layer.reasons))
    own = [f"{name}: {old} -> {new}" for name, old, new in changed_values(
        {k: v for k, v in before.items() if k != "reads"}, {k: v for k, v in now.items() if k != "reads"})]
    return (own or ["what comes before it"])[:MAX_REASONS]
