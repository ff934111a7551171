"""Tags of sources (kind, level, synthetic): `--tag` values and record fields, by which blends select sources.

A source has every tag value that its documents have: one if all documents agree, several otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.documents.records import format_tag
from megatron_sov.base.errors import UserError

MAX_VALUES = 64
"""Maximum values per tag and source: a field with more, such as an address, is useless for selection."""
SOURCE = "source"
"""Key for patterns over source names; reserved, so `--tag` rejects it."""
SYNTHETIC = "synthetic"
"""Tag for sources written by models."""
CORPUS, SYNTHESIS = "corpus", "synthesis"
"""Artifact kinds from `sov-data run` and `sov-data synth`."""
_KEY = re.compile(r"[a-z_][a-z0-9_]*")

Tags = Mapping[str, Sequence[str]]
"""Tag -> values."""


@dataclass(frozen=True)
class AssignedTag:
    """A tag from the command line: `[SOURCE:]KEY=VALUE`."""

    key: str
    value: str
    source: str = ""
    """Source name; "": all sources."""


def parse_tags(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[AssignedTag, ...]]:
    """Parse `KEY`, `KEY=VALUE` and `SOURCE:KEY=VALUE`.

    Returns:
        Record fields to read tags from (`KEY`), and assigned tags.

    Raises:
        UserError: a key or value is malformed.
    """
    fields: list[str] = []
    assigned: list[AssignedTag] = []
    for argument in arguments:
        left, equals, value = argument.partition("=")
        source, _, key = left.rpartition(":") if equals else ("", "", left)
        if not _KEY.fullmatch(key) or key == SOURCE:
            raise UserError(f"--tag {argument!r}: {key!r} cannot name a tag (letters a-z, digits and '_', "
                            f"not {SOURCE!r}); write a field's name, KEY=VALUE or SOURCE:KEY=VALUE, e.g. "
                            "kind=ko")
        if equals and format_tag(value) is None:
            raise UserError(f"--tag {argument!r}: {value!r} cannot be a tag (up to 60 letters, digits, '.', "
                            "':', '+', '_', '-')")
        if equals:
            assigned.append(AssignedTag(key, value, source))
        elif key not in fields:
            fields.append(key)
    return tuple(fields), tuple(assigned)


def add_synthetic_tags(assigned: Sequence[AssignedTag], fields: Sequence[str],
                       origins: Mapping[str, Path]) -> tuple[AssignedTag, ...]:
    """Add `synthetic=true` for each source from `sov-data synth`, unless the user tags the source
    (`assigned`) or the records (`fields`). `origins`: source -> artifact folder."""
    tagged = {tag.source for tag in assigned if tag.key == SYNTHETIC}
    # the user's tag for all sources, or for each record, takes precedence
    if "" in tagged or SYNTHETIC in fields:
        return tuple(assigned)
    return (*assigned, *(AssignedTag(SYNTHETIC, "true", name) for name, origin in origins.items()
                         if name not in tagged and read_manifest(origin).kind == SYNTHESIS))


def check_tag_sources(assigned: Sequence[AssignedTag], names: Sequence[str]) -> None:
    """Check that every tagged source exists. Raises `UserError`: a tag names an unknown source."""
    for tag in assigned:
        if tag.source and tag.source not in names:
            raise UserError(f"--tag {tag.source}:{tag.key}={tag.value}: there is no source {tag.source!r} "
                            f"(sources: {', '.join(names)})")


def merge_source_tags(name: str, recorded: Sequence[Tags],
                      assigned: Sequence[AssignedTag]) -> dict[str, list[str]]:
    """Merge a source's tags: `assigned` values replace `recorded` values (per unit), and a tag for a single
    source replaces a tag for all sources. Raises `UserError`: a tag with more than `MAX_VALUES` values."""
    tags: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for part in recorded for key in part):
        values = sorted({value for part in recorded for value in part.get(key, ())})
        if len(values) > MAX_VALUES:
            raise UserError(f"--tag {key}: source {name} has {len(values)} values of it, e.g. {values[0]!r} "
                            f"and {values[-1]!r}; a tag describes a whole source and has at most "
                            f"{MAX_VALUES} values")
        tags[key] = values
    for tag in sorted((t for t in assigned if t.source in ("", name)), key=lambda t: t.source != ""):
        tags[tag.key] = [tag.value]
    return tags


def read_source_tags(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tags in a source's manifest record; the bucket counts as a tag."""
    tags: dict[str, list[str]] = {}
    if bucket := record.get("bucket"):
        # buckets are named "True" and "False" by Python, tags by JSON
        value = bucket["value"]
        tags[bucket["field"]] = [value.lower() if value in ("True", "False") else value]
    return tags | record.get("tags", {})


def is_chosen(where: Mapping[str, Sequence[str]], record: Mapping[str, Any]) -> bool:
    """Return whether a source's manifest record meets every condition: each tag exists, and all values match
    a pattern. `where`: tag, or `SOURCE` for the name -> shell patterns."""
    tags: dict[str, Sequence[str]] = {**read_source_tags(record), SOURCE: [record["name"]]}
    for key, patterns in where.items():
        values = tags.get(key, ())
        # a source is selected as a whole: a single value without match excludes the source
        if not values or not all(any(fnmatchcase(value, p) for p in patterns) for value in values):
            return False
    return True


def find_source_artifact(path: Path) -> Path | None:
    """Return the folder of the complete corpus or synthesis at or above `path`, or None."""
    for folder in (path, *path.absolute().parents):
        if (folder / MANIFEST).is_file():
            try:
                return folder if read_manifest(folder).kind in (CORPUS, SYNTHESIS) else None
            except UserError:  # a damaged manifest, or another program's
                return None
    return None
