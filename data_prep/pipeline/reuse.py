"""What an earlier plan of the same run's folder has made of a shard, taken over into the folder of a new one.

A folder's address follows from all files of a source.  A shard's follows from its own files alone, up to the
first step that looks at all documents: where one file has changed, or came, the results of the other shards
get a second name in the new folder, and nothing is done again.  What stands in them is the same either way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.pipeline.addresses import address
from data_prep.pipeline.plan import Layer, Plan, SourcePlan
from megatron_sov.artifacts import new_file, new_folder
from megatron_sov.sealed import try_read_json, write_json

KEYS = "keys.json"
"""Number of each shard -> address of what stands in its files."""


@dataclass(frozen=True)
class Reusable:
    """A shard's results in the folder of an earlier plan."""

    layer: Layer
    """Whose folder they shall be in."""
    shard: int
    folder: Path
    """Where they are."""


def reusable(plan: Plan, output: Path) -> Iterator[Reusable]:
    """Yield what the folders of earlier plans have of a plan's shards that are not done."""
    for source in plan.sources:
        for layer, keys in zip(source.layers, _keys(source), strict=True):
            open_shards = {shard: keys[shard] for shard in source.shards
                           if not layer.rows(output, shard).exists()}
            for folder, known in _others(output / layer.folder, layer) if open_shards else ():
                for shard in [s for s, key in open_shards.items() if known.get(str(s)) == key]:
                    if all((folder / file.name).exists() for file in _files(layer, output, shard)):
                        del open_shards[shard]
                        yield Reusable(layer, shard, folder)


def take_over(plan: Plan, output: Path) -> None:
    """Give what can be reused its place in the plan's folders, and write down what these will hold."""
    for found in list(reusable(plan, output)):
        for file in _files(found.layer, output, found.shard):
            _give_name(found.folder / file.name, file)
    for source in plan.sources:
        for layer, keys in zip(source.layers, _keys(source), strict=True):
            if not (output / layer.folder / KEYS).is_file():
                write_json(output / layer.folder / KEYS, keys, Path(layer.folder).name)


def _keys(source: SourcePlan) -> Iterator[dict[int, str]]:
    """Yield shard -> address of what stands in its files, for each layer of a source."""
    keys = source.shards
    for i, layer in enumerate(source.layers):
        if layer.shared:  # it follows from all documents, and its folder's address with it
            keys = {shard: address({"folder": layer.folder, "shard": shard}) for shard in keys}
        elif i:
            how = {name: reason for name, reason in layer.reasons.items() if name != "reads"}
            keys = {shard: address(how | {"reads": key}) for shard, key in keys.items()}
        yield keys


def _others(folder: Path, layer: Layer) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folders of a step that other plans have made, and what they hold."""
    if layer.shared:
        return
    pattern = f"{layer.number:02d}-{layer.kind}-*/{KEYS}"
    for file in sorted(folder.parent.glob(pattern), key=lambda file: -file.stat().st_mtime_ns):
        if file.parent != folder and (known := try_read_json(file, file.parent.name)):  # only a shortcut
            yield file.parent, known


def _files(layer: Layer, output: Path, shard: int) -> list[Path]:
    """Return what a shard's task leaves, last what says that it is done."""
    broken = [] if layer.number else [layer.broken(output, shard)]
    return [*broken, layer.counts(output, shard), layer.rows(output, shard)]


def _give_name(old: Path, new: Path) -> None:
    """Let a file, or a folder of files, stand under a second name."""
    if old.is_dir():
        with new_folder(new) as temporary:
            shutil.copytree(old, temporary, copy_function=link, dirs_exist_ok=True)
    else:
        with new_file(new) as temporary:
            link(old, temporary)


def link(file: Path | str, name: Path | str) -> None:
    """Give a file a second name; where the disk cannot, copy it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
