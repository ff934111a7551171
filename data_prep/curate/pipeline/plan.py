"""The plan of a run: which source is cut into which shards, which steps each goes through, and the folder of
everything; a plain file that tasks read wherever they run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_prep.curate.pipeline.addresses import (
    REASONS_FILE, Mark, address, entries_of, input_names, known_file, tree_hash)
from data_prep.curate.pipeline.pipeline_file import Pipeline, StepEntry
from data_prep.curate.pipeline.step import SOURCE_COLUMNS, ColumnType, Step
from data_prep.curate.sources.formats import reader, reader_class
from data_prep.curate.sources.source import SourcePiece, SourceSettings
from megatron_sov.base.artifacts import MANIFEST, atomic_write, new_file, new_folder
from megatron_sov.base.sealed import PLACE, SEAL, read_json, read_lines, sealed, try_read_json, write_json

PARSE, OUTPUT = "parse", "output"
PIECES = "pieces.jsonl"
"""The number and the pieces of each shard of a source, a line for each shard."""


@dataclass(frozen=True)
class Layer:
    """A folder with one file for each shard of a source."""

    number: int
    """0: parsed documents; then the steps of the file; the last is the output."""
    kind: str
    """Name of the step, or `PARSE`, or `OUTPUT`."""
    folder: str
    """Relative to the run's output folder."""
    reasons: dict[str, Any]
    """What its address follows from."""
    shared: str = ""
    """Folder of the step's passes; "": it has none."""

    def file(self, output: Path, shard: int) -> Path:
        """Return where a shard's documents, or what the step made of them, lie."""
        return output / self.folder / f"{shard:05d}.parquet"

    def counts(self, output: Path, shard: int) -> Path:
        return output / self.folder / f"{shard:05d}.json"

    def broken(self, output: Path, shard: int) -> Path:
        """Return where what was broken in a shard is listed, of parsed documents."""
        return output / self.folder / f"{shard:05d}.broken.jsonl"

    def rows(self, output: Path, shard: int) -> Path:
        """Return what stands when a shard is done: a file, or of the output a folder."""
        return output / self.folder / f"{shard:05d}" if self.kind == OUTPUT else self.file(output, shard)


@dataclass(frozen=True)
class SourcePlan:
    settings: SourceSettings
    shards: dict[int, str]
    """Number of each shard, in the order of its documents -> address of what they are parsed from."""
    num_files: int
    raw_bytes: int
    layers: tuple[Layer, ...]
    """Parsed documents, the steps that look at this source, the output."""
    told: tuple[str, ...] = ()
    """What of its folders is passed over, in sentences."""


@dataclass(frozen=True)
class PassPlan:
    """A pass of a step over all of its sources."""

    name: str
    num_tasks: int


@dataclass(frozen=True)
class StepPlan:
    """One step, for all sources that it looks at."""

    entry: StepEntry
    sources: tuple[str, ...]
    passes: tuple[PassPlan, ...]
    adds: dict[str, ColumnType]


@dataclass(frozen=True)
class PipelinePlan:
    pipeline: Pipeline
    sources: tuple[SourcePlan, ...]
    steps: tuple[StepPlan, ...]

    @property
    def address(self) -> str:
        """Return what stands for the output: its address follows from everything before it."""
        pack = self.pipeline.pack
        return address({"output": [[s.settings.name, s.layers[-1].folder] for s in self.sources],
                        "pack": None if pack is None else dataclasses.asdict(pack) | {
                            "tokenizer": tree_hash(pack.tokenizer / MANIFEST)}})

    def list_passed_over(self) -> list[str]:
        return [f"source {source.settings.name}: {sentence}" for source in self.sources
                for sentence in source.told]

    def source(self, name: str) -> SourcePlan:
        return next(s for s in self.sources if s.settings.name == name)

    def columns(self, before: int | None = None) -> dict[str, ColumnType]:
        """Return column -> type of documents as a step of a number sees them; None: as they leave."""
        found: dict[str, ColumnType] = dict(SOURCE_COLUMNS)
        for step in self.steps:
            if before is None or step.entry.number < before:
                found |= step.adds
        return found

    def write(self, file: Path) -> None:
        write_json(file, json.loads(TypeAdapter(PipelinePlan).dump_json(self)), file.name)

    @staticmethod
    def read(file: Path) -> PipelinePlan:
        return TypeAdapter(PipelinePlan).validate_json(json.dumps(read_json(file, of=file.name)))


def make_plan(pipeline: Pipeline, output: Path, *, keep: bool = True) -> PipelinePlan:
    """Look at all inputs and return what is to be done.

    Args:
        pipeline: the file.
        output: the run's folder; hashes of inputs, and the pieces of shards, are kept there.
        keep: whether anything may be written.

    Raises:
        UserError: an input cannot be read, or a source holds nothing.
    """
    sources = [_parsed(source, pipeline, output, keep) for source in pipeline.sources]
    steps: list[StepPlan] = []
    for entry in pipeline.steps:
        step = entry.build(pipeline.folder)
        # A step that cannot meet a document of a source has no layer there: changing it leaves that source
        # done.
        looks_at = [i for i, source in enumerate(sources) if _sees(entry, source.settings, steps)]
        passes = tuple(PassPlan(p.name, sum(len(sources[i].shards) for i in looks_at)
                                if p.num_tasks is None else p.num_tasks) for p in step.passes())
        # All that outcomes follow from. `only.sources` is left out: it decides which sources have a layer,
        # and not what is in it.
        reasons = {"step": entry.kind, "version": step.version, "settings": entry.settings(),
                   "only": dataclasses.asdict(entry.only) if entry.only.kinds else None,
                   "files": file_hashes(step)}
        reads = [[sources[i].settings.name, sources[i].layers[-1].folder] for i in looks_at]
        # A step with passes looks at all documents together: its outcome for one follows from all sources.
        if passes:
            together = reasons | {"reads": reads,
                                  "priority": [sources[i].settings.priority for i in looks_at]}
        name = f"{entry.number:02d}-{entry.kind}"
        for i in looks_at:
            mine = together if passes else reasons | {"reads": sources[i].layers[-1].folder}
            folder = f"{name}-{address(mine)}"
            layer = Layer(entry.number, entry.kind, f"shards/{sources[i].settings.name}/{folder}", mine,
                          f"shared/{folder}" if passes else "")
            sources[i] = dataclasses.replace(sources[i], layers=(*sources[i].layers, layer))
        steps.append(StepPlan(entry, tuple(sources[i].settings.name for i in looks_at), passes,
                              dict(step.adds)))
    number = len(pipeline.steps) + 1
    return PipelinePlan(pipeline, tuple(_with_output(source, pipeline, number) for source in sources),
                        tuple(steps))


def file_hashes(step: Step) -> list[str]:
    return [tree_hash(Path(file)) for file in step.files()]


def _sees(entry: StepEntry, source: SourceSettings, before: Sequence[StepPlan]) -> bool:
    if entry.only.sources and source.name not in entry.only.sources:
        return False
    # Once a step sets kinds, a source of any kind may hold such documents.
    told_by_step = any("kind" in step.adds for step in before)
    return not entry.only.kinds or told_by_step or source.kind in entry.only.kinds


def _with_output(source: SourcePlan, pipeline: Pipeline, number: int) -> SourcePlan:
    # The steps' names say which columns the files have.
    reasons = {"step": OUTPUT, "name": pipeline.output.name, "reads": source.layers[-1].folder,
               "columns": [step.kind for step in pipeline.steps]}
    folder = f"shards/{source.settings.name}/{number:02d}-{OUTPUT}-{address(reasons)}"
    return dataclasses.replace(source, layers=(*source.layers, Layer(number, OUTPUT, folder, reasons)))


def _parsed(source: SourceSettings, pipeline: Pipeline, output: Path, keep: bool) -> SourcePlan:
    read_by = reader(source)
    pieces = read_by.pieces()
    names = input_names(pieces)
    entries = entries_of([source.file(name) for name in names], known_file(output, source.name), keep=keep)
    marks = {name: entries[str(source.file(name))][:-1] for name in names}
    contents = {name: entries[str(source.file(name))][-1] for name in names}
    # The path of a source is no part of its address: the same files at another path count as done.
    settings = json.loads(TypeAdapter(SourceSettings).dump_json(source))
    for outside in ("priority", "folder", "path"):  # what is read says it better
        del settings[outside]
    version = reader_class(source.format).version
    how = {"step": PARSE, "settings": settings, "on_bad": pipeline.on_bad,
           # Version 1 is left out, so that addresses from before readers had versions still hold.
           **({"version": version} if version > 1 else {})}
    # Two addresses: a shard's follows from its own pieces, so that it can be taken over into another plan;
    # the folder's from all files.
    groups = shards_of(pieces, pipeline.shard_bytes)
    shards = {number: address(how | {"shard": number, "pieces": [
        [dataclasses.astuple(piece), [contents.get(name, "") for name in (piece.file, *piece.beside)]]
        for piece in group]}) for number, group in groups.items()}
    reasons = how | {"shard_bytes": pipeline.shard_bytes,
                     "files": address({"files": [[piece.file for piece in pieces], contents]})}
    folder = f"shards/{source.name}/00-{PARSE}-{address(reasons)}"
    if keep:
        _write_pieces(output / folder / PIECES, groups, marks)
    return SourcePlan(source, shards, len(names), sum(piece.size_bytes for piece in pieces),
                      (Layer(0, PARSE, folder, reasons),), tuple(read_by.told))


def _write_pieces(file: Path, groups: Mapping[int, Sequence[SourcePiece]], marks: Mapping[str, Mark]) -> None:
    """Write what the tasks of shards read, unless it stands there."""
    lines = [json.dumps([number, [dataclasses.asdict(piece) for piece in group],
                         {name: marks[name] for name in input_names(group)}])
             for number, group in groups.items()]
    made = sealed("\n".join([*lines, json.dumps({SEAL: PLACE}), ""]).encode())
    # Tasks of an earlier submission may be reading it: the same bytes are not written again.
    if not file.is_file() or file.read_bytes() != made:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, made)


def pieces_of(output: Path, layer: Layer, shard: int) -> tuple[list[SourcePiece], dict[str, Mark]]:
    """Return the pieces of one shard of a plan that is written, and the files that they are read from with
    their marks when the plan was made."""
    # A line is parsed only if it is the one: a source may have very many shards.
    begin = f"[{shard}, ".encode()
    for line in read_lines(output / layer.folder / PIECES):
        if line.startswith(begin):
            _, pieces, marks = json.loads(line)
            return [SourcePiece(**{**piece, "beside": tuple(piece["beside"])}) for piece in pieces], marks
    raise KeyError(f"{layer.folder}: has no shard {shard}")


def note_reasons(output: Path, plan: PipelinePlan) -> None:
    """Write into each folder what its address follows from, for those who ask later why another one is
    needed."""
    for source in plan.sources:
        for layer in source.layers:
            folder = output / layer.folder
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / REASONS_FILE).is_file():
                write_json(folder / REASONS_FILE, layer.reasons)


# Where a source is cut into shards, and which numbers they have: so that a file that comes, goes or changes
# leaves the shards of the other files as they are, with their numbers, which stand in documents' ids.

NUMBERS = 1_000_000_000
"""Numbers of shards lie below it."""
MAX_PIECES = 100_000
"""About so many pieces make a shard too, however small they are: of empty files, or of no format."""
_HASHES = 1 << 64


def shards_of(pieces: Sequence[SourcePiece], shard_bytes: int) -> dict[int, list[SourcePiece]]:
    """Return number -> pieces of each shard, in the order of the pieces.

    Args:
        pieces: of a source.
        shard_bytes: about so many bytes make a shard.
    """
    found: dict[int, list[SourcePiece]] = {}
    for group in _groups(pieces, shard_bytes):
        # From the name of the first piece: a shard keeps its number, which is in documents' ids, when others
        # come or go.
        number = _hash(group[0]) % NUMBERS
        while number in found:
            number = (number + 1) % NUMBERS
        found[number] = group
    return found


def _groups(pieces: Sequence[SourcePiece], shard_bytes: int) -> Iterator[list[SourcePiece]]:
    """Yield the pieces of each shard.

    From half of the asked size on a shard ends before a piece whose name hashes low, at the latest at one and
    a half of it (content-defined chunking, as in Muthitacharoen, Chen and Mazieres, SOSP 2001, of names):
    cuts do not depend on how many files stand before, and behind a change they soon are where they were.
    """
    group: list[SourcePiece] = []
    size_bytes = 0.0
    for piece in pieces:
        piece_bytes = max(piece.size_bytes, shard_bytes / MAX_PIECES)
        is_low = _hash(piece) / _HASHES < piece_bytes / (shard_bytes / 2)
        is_too_much = size_bytes + piece_bytes > 1.5 * shard_bytes and (
            piece.size_bytes > 0 or len(group) >= MAX_PIECES)  # empty files go along with a large one
        if group and (is_too_much or (is_low and size_bytes >= shard_bytes / 2)):
            yield group
            group, size_bytes = [], 0.0
        group.append(piece)
        size_bytes += piece_bytes
    if group:
        yield group


def _hash(piece: SourcePiece) -> int:
    place = f"{piece.file}:{piece.start}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big")


# What an earlier plan of the same run's folder has made of a shard, taken over into the folder of a new one.

KEYS = "keys.json"
"""Number of each shard -> address of what stands in its files."""


def reusable(plan: PipelinePlan, output: Path) -> Iterator[tuple[Layer, int, Path]]:
    """Yield what the folders of earlier plans have of a plan's shards that are not done: the layer whose
    folder it shall be in, the shard, and where it is."""
    for source in plan.sources:
        for layer, keys in zip(source.layers, _keys(source), strict=True):
            open_shards = {shard: keys[shard] for shard in source.shards
                           if not layer.rows(output, shard).exists()}
            # Newest first; a shard that one folder has is not looked for in the next.
            for folder, known in _others(output / layer.folder, layer) if open_shards else ():
                same = [shard for shard, key in open_shards.items() if known.get(str(shard)) == key]
                for shard in same:
                    # The keys say what a folder will hold: whether the shard is done there, its files say.
                    if all((folder / file.name).exists() for file in _files(layer, output, shard)):
                        del open_shards[shard]
                        yield layer, shard, folder


def take_over(plan: PipelinePlan, output: Path) -> None:
    """Give what can be reused its place in the plan's folders, and write down what these will hold."""
    # A list, since giving names changes what `reusable` looks at.
    for layer, shard, folder in list(reusable(plan, output)):
        for file in _files(layer, output, shard):
            # In the order of `_files`: what says that the shard is done comes last.
            _give_name(folder / file.name, file)
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
            # A shard follows from the same shard of the layer before it, and not from the whole folder.
            how = {name: reason for name, reason in layer.reasons.items() if name != "reads"}
            keys = {shard: address(how | {"reads": key}) for shard, key in keys.items()}
        yield keys


def _others(folder: Path, layer: Layer) -> Iterator[tuple[Path, dict[str, str]]]:
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
