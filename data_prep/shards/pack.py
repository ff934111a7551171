"""`sov-data pack`: options and checks."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Lt

from data_prep.shards.foreign_tokenizer import explain_foreign_tokenizer, fix_foreign_tokenizer
from data_prep.tags import AssignedTag, parse_tags
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.layouts import parse_renames
from megatron_sov.base.documents.records import find_column_problems
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.hints.kinds import classify_folder
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Flag, Fraction, ProblemCode, SettingsProblem, count_cores)

_NAME = re.compile(r"\w[\w.-]*")

Bos = Literal["none", "start"]
Eod = Literal["append", "none"]
OnBad = Literal["refuse", "quarantine"]


@dataclass(frozen=True)
class PackSource:
    """An input path with a source name for blends, evaluations and folders."""

    name: str
    path: Path


@dataclass(frozen=True)
class PackSettings:
    """Settings for packing sources."""

    heldout_share: Fraction = 0.02
    """Expected share of documents in the split "heldout", in [0, 1)."""
    reading: RecordReading = field(default_factory=lambda: RecordReading("text"))
    """Record layout; `kind` is the format."""
    bos: Bos = "none"
    """"start": documents begin with the tokenizer's bos."""
    eod: Eod = "append"
    """"append": documents end with the tokenizer's eos."""
    on_bad: OnBad = "refuse"
    """"refuse": stop at the first bad record; "quarantine": list bad records and continue."""
    shard_tokens: AtLeastOne = 2_000_000_000
    """Token limit per shard."""
    tags: tuple[AssignedTag, ...] = ()
    """Tags from the command line, in addition to `RecordReading.tags`."""

    def problems(self) -> list[SettingsProblem]:
        reading = self.reading
        problems = [SettingsProblem(ProblemCode.BOUND, "columns", sentence)
                    for sentence in find_column_problems(reading.columns)]
        if reading.columns and reading.kind == "prompt":
            problems.append(SettingsProblem(
                ProblemCode.RULE, "columns", "a prompt has no response to which its number could belong; its "
                "fields travel in .extra.jsonl as they are", reading.columns[0]))
        if reading.by_line and reading.kind not in (None, "text"):
            problems.append(SettingsProblem(ProblemCode.RULE, "by_line", "is for text, and the format is "
                                            f"{reading.kind}; leave it out"))
        if reading.renames and reading.kind in (None, "text"):
            problems.append(SettingsProblem(
                ProblemCode.RULE, "renames", "is for chats, preferences and prompts; name the field of a "
                "text by --text-field", ",".join(target for target, _ in reading.renames)))
        return problems


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Turn text, chats, preferences or prompts into token shards (.bin and .idx in Megatron-Core's format),
    and hold out a share of the documents. Special tokens spelled in documents stay ordinary text. A killed
    command continues when run again."""

    tokenizer: Annotated[Path, Flag(value="DIR")]
    """Tokenizer from `sov-tokenizer train` or `import`."""
    input: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH", many=True)]
    """A text, .jsonl, .json, .parquet or .arrow file (text and JSON also .gz and .zst) or a folder with such
    files; each is one source, named after the file or folder unless NAME is given; takes several paths, and
    may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the token shards."""
    heldout: Annotated[Fraction, Flag(value="SHARE")] = PackSettings.heldout_share
    """Share of documents held out from training, chosen by text hash."""
    format: Literal["text", "chat", "preference", "prompt"] = "text"
    """Record layout: text; chat: messages; preference: chosen and rejected; prompt: a prompt to respond
    to."""
    text_field: Annotated[str, Flag(value="NAME")] = RecordReading.text_field
    """Field or column with the text."""
    lines: bool = False
    """Make each line in a text file a document."""
    renames: Annotated[tuple[str, ...], Flag("--columns", "TARGET=FIELD,...")] = ()
    """Read fields with other names, as prompt=instruction,response=output; FIELD+FIELD joins two fields by a
    line feed."""
    columns: Annotated[tuple[str, ...], Flag("--column", "NAME")] = ()
    """A numeric field that goes with each token into the objective (for a preference also a list of two:
    chosen, rejected); it may be repeated."""
    bucket_by: Annotated[str | None, Flag(value="FIELD")] = None
    """Make each value in this field a source, NAME-VALUE, for a curriculum's blends."""
    tags: Annotated[tuple[str, ...], Flag("--tag", "KEY|[SOURCE:]KEY=VALUE")] = ()
    """Tag sources in the manifest, for blends: by a record field (kind), or by a value (ko:kind=ko); it may
    be repeated."""
    bos: Bos = "none"
    """start: documents begin with bos."""
    eod: Eod = "append"
    """append: documents end with eos; prompts never do."""
    on_bad: OnBad = "refuse"
    """Bad records: stop at the first, or list them in quarantine.jsonl and continue."""
    max_document_bytes: Annotated[AtLeastOne, Lt(1 << 31)] = RecordReading.max_document_bytes
    """A longer record is bad."""
    shard_tokens: AtLeastOne = PackSettings.shard_tokens
    """Token limit per shard."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes that encode; the output does not depend on it (default: this machine's cores)."""
    overwrite: bool = False
    """Replace existing token shards."""

    def problems(self) -> list[SettingsProblem]:
        problem = explain_foreign_tokenizer(self.tokenizer) if self.tokenizer.exists() else ""
        if not problem:
            return []
        return [SettingsProblem(ProblemCode.FILE, "tokenizer", problem, self.tokenizer,
                                fix=fix_foreign_tokenizer(self.tokenizer) or "")]


@dataclass(frozen=True)
class PackRequest:
    """Checked input for `pack_run.run_pack`."""

    options: PackOptions
    sources: list[PackSource]
    settings: PackSettings


def check_pack(options: PackOptions) -> PackRequest:
    if options.bucket_by == "":
        raise UserError("--bucket-by '': is no field; name one, or leave it out")
    tag_fields, tags = parse_tags(options.tags)
    reading = RecordReading(options.format, options.text_field, max_document_bytes=options.max_document_bytes,
                            columns=options.columns, bucket_by=options.bucket_by or "", tags=tag_fields,
                            renames=parse_renames(options.renames), by_line=options.lines)
    settings = PackSettings(options.heldout, reading, bos=options.bos, eod=options.eod, on_bad=options.on_bad,
                            shard_tokens=options.shard_tokens, tags=tags)
    return PackRequest(options, parse_sources(options.input), settings)


PACK = DeclaredCommand(PackOptions, check_pack, "data_prep.shards.pack_run:run_pack", runs_in_checks=True,
                       proposal_function="data_prep.shards.pack_run:check_proposal")


def parse_sources(arguments: Sequence[str]) -> list[PackSource]:
    """Parse `[NAME=]PATH` arguments. Raises `UserError`: a name is malformed or repeated, or a path is empty
    or a pattern."""
    sources: list[PackSource] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            path = argument
            name = os.path.basename(os.path.realpath(argument))  # unlike `resolve`, accepts circular links
            if Path(argument).is_file():
                name = name.split(".")[0] if name.endswith((".gz", ".zst")) else Path(name).stem
            name = re.sub(r"[^\w.-]+", "-", name).lstrip(".-")
        if not path:
            raise UserError(f"--input {argument!r}: names no file or folder; write NAME=PATH")
        file, colon, weight = path.rpartition(":")
        if colon and re.fullmatch(r"[0-9.]+", weight) and not Path(path).exists() and Path(file).exists():
            raise UserError(f"--input {argument!r}: packing takes no weight; pack {file}, and pass --data "
                            f"SHARDS:{weight} to the training command", Fix(words={argument: file}))
        if classify_folder(Path(path)) == "corpus":
            raise UserError(f"--input {argument!r}: is the output of `sov-data run`, with its documents in "
                            f"{path}/text; pass that folder", Fix(words={path: f"{path}/text"}))
        if "*" in path and not Path(path).exists():  # a shell passes a pattern on if nothing matches
            raise UserError(f"--input {argument!r}: no file matches it; check the folder")
        if not _NAME.fullmatch(name) or name == "tokenizer":
            raise UserError(f"--input {argument!r}: {name!r} cannot name a source (letters, digits, '.', "
                            f"'_', '-', and not 'tokenizer'); give a name, e.g. --input "
                            f"{shlex.quote(f'web={path}')}")
        if name in (s.name for s in sources):
            raise UserError(f"--input {argument!r}: a source named {name!r} is given already; "
                            f"name them apart, e.g. --input {shlex.quote(f'{name}2={path}')}")
        sources.append(PackSource(name, Path(path)))
    return sources
