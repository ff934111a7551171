"""Tags of sources: what their documents are (kind, level, synthetic), for blends to choose by.

A tag's value is read from a field of the records, or is given for a source.  A source has the values that its
documents have: one where it is pure, and several where it is not.
"""

from __future__ import annotations

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
"""Values of one tag that a source may have; what has more, such as an address, chooses nothing."""
SOURCE = "source"
"""What patterns over the names of sources are written under; no tag can be called so."""
SYNTHETIC = "synthetic"
"""Tag of sources that models wrote."""
_KEY = re.compile(r"[a-z_][a-z0-9_]*")

Tags = Mapping[str, Sequence[str]]
"""Tag -> values."""


@dataclass(frozen=True)
class AssignedTag:
    """A tag whose value does not stand in the records."""

    key: str
    value: str
    source: str = ""
    """Name of the source that it belongs to; "": all of them."""


def parse_tags(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[AssignedTag, ...]]:
    """Read `KEY`, `KEY=VALUE` and `SOURCE:KEY=VALUE`.

    Returns:
        The fields to read tags from, and the tags that are given.

    Raises:
        UserError: a name or value that no tag can have.
    """
    fields: list[str] = []
    given: list[AssignedTag] = []
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
            given.append(AssignedTag(key, value, source))
        elif key not in fields:
            fields.append(key)
    return tuple(fields), tuple(given)


def add_synthetic_tags(given: Sequence[AssignedTag], fields: Sequence[str],
                 origins: Mapping[str, Path]) -> tuple[AssignedTag, ...]:
    """Return tags with one for each source that models wrote, unless the user has given it.

    Args:
        given: tags of the command line.
        fields: of records that tags are read from.
        origins: source -> the artifact that it lies in.
    """
    named = {tag.source for tag in given if tag.key == SYNTHETIC}
    # What the user says of all sources, or of each record, is not overruled.
    if "" in named or SYNTHETIC in fields:
        return tuple(given)
    return (*given, *(AssignedTag(SYNTHETIC, "true", name) for name, origin in origins.items()
                      if name not in named and read_manifest(origin).kind == SYNTHESIS))


def check_tag_sources(given: Sequence[AssignedTag], names: Sequence[str]) -> None:
    """Refuse a tag for a source that there is not.

    Raises:
        UserError: naming it.
    """
    for tag in given:
        if tag.source and tag.source not in names:
            raise UserError(f"--tag {tag.source}:{tag.key}={tag.value}: there is no source {tag.source!r} "
                            f"(sources: {', '.join(names)})")


def merge_source_tags(name: str, found: Sequence[Tags], given: Sequence[AssignedTag]) -> dict[str, list[str]]:
    """Return the tags of a source; what is given for it stands above what its records say, and what is given
    for it alone above what is given for all.

    Args:
        name: its name.
        found: what each part of its records has.
        given: by the user.

    Raises:
        UserError: a tag has more than `MAX_VALUES` values.
    """
    tags: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for part in found for key in part):
        values = sorted({value for part in found for value in part.get(key, ())})
        if len(values) > MAX_VALUES:
            raise UserError(f"--tag {key}: source {name} has {len(values)} values of it, e.g. {values[0]!r} "
                            f"and {values[-1]!r}; a tag says what a whole source is, and has at most "
                            f"{MAX_VALUES}")
        tags[key] = values
    for tag in sorted((t for t in given if t.source in ("", name)), key=lambda t: t.source != ""):
        tags[tag.key] = [tag.value]
    return tags


def read_source_tags(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tags of a source by the manifest's record of it; a bucket is one."""
    tags: dict[str, list[str]] = {}
    if bucket := record.get("bucket"):
        # a bucket is named by Python's word for true
        value = bucket["value"]
        tags[bucket["field"]] = [value.lower() if value in ("True", "False") else value]
    return tags | record.get("tags", {})


def is_chosen(where: Mapping[str, Sequence[str]], record: Mapping[str, Any]) -> bool:
    """Return whether a source meets all conditions: all values that it has of a tag fit one of the patterns.

    Args:
        where: tag, or `SOURCE` for the name, -> patterns as the shell has them.
        record: the manifest's record of the source.
    """
    tags: dict[str, Sequence[str]] = {**read_source_tags(record), SOURCE: [record["name"]]}
    # A source is taken as a whole: one value that does not fit leaves it out.
    return all(tags.get(key) and all(any(fnmatchcase(value, pattern) for pattern in patterns)
                                     for value in tags[key])
               for key, patterns in where.items())


CORPUS, SYNTHESIS = "corpus", "synthesis"
"""Kinds of what `sov-data run` and `sov-data synth` write."""


def find_source_artifact(path: Path) -> Path | None:
    """Return the corpus, or the folder of synthesis, that a path is, or lies in; None where there is no
    complete one."""
    for folder in (path, *path.absolute().parents):
        if (folder / MANIFEST).is_file():
            try:
                return folder if read_manifest(folder).kind in (CORPUS, SYNTHESIS) else None
            # A manifest of another program, or a broken one: then there is no artifact of ours.
            except UserError:
                return None
    return None
