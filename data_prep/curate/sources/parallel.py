"""Text in two languages: each pair of sentences, or several of them, is a document."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

from data_prep.curate.sources.encodings import COMPRESSED, EncodingLimits, blocks_within, unpacked
from data_prep.curate.sources.lines import split_lines
from data_prep.curate.sources.reader import FileReader, ReadingJob, SourceItem, source_files
from data_prep.curate.sources.source import Broken, Raw, SourcePiece
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import ONCE, AtLeastOne, Bound, Breach, NotNegativeInt, ProblemCode

_XML_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def _not_two(languages: tuple[str, ...]) -> Breach | None:
    return None if len(languages) in (0, 2) else (ProblemCode.BOUND, "must be two, as [en, ko]", "")


def _no_template(template: str) -> Breach | None:
    try:
        asked = {name for _, name, spec, turn in string.Formatter().parse(template)
                 if name is not None or spec or turn}
    except ValueError as e:
        return ProblemCode.BOUND, f"is no template ({e})", ""
    if {"source", "target"} <= asked <= {"source", "target", "source_language", "target_language"}:
        return None
    return (ProblemCode.BOUND, "must have {source} and {target}, and may have {source_language} and "
            "{target_language}", "")


@dataclass(frozen=True)
class ParallelOptions(EncodingLimits):
    """Options of parallel text."""

    languages: Annotated[tuple[str, ...], ONCE, Bound(_not_two)] = ()
    """Two languages: endings of two files of lines ("data.en", "data.ko"), codes of a TMX file."""
    columns: Annotated[tuple[NotNegativeInt, NotNegativeInt], ONCE] = (0, 1)
    """Columns of a .tsv file that hold the two, from 0."""
    template: Annotated[str, Bound(_no_template)] = "{source}\n{target}"
    """What a pair becomes."""
    pairs: AtLeastOne = 1
    """So many pairs that follow one another become one document, with an empty line between."""
    names: tuple[str, str] = field(default=("", ""))
    """What {source_language} and {target_language} of the template are; empty: the languages."""


class ParallelReader(FileReader):
    """Tables of two columns (.tsv), pairs of files with as many lines, and TMX files."""

    format = "parallel"
    suffixes = frozenset([".tsv", ".tmx"])
    Options = ParallelOptions

    def pieces(self) -> list[SourcePiece]:
        """Return the files, in order; of two files of lines the first one, with the other beside it.

        Raises:
            UserError: there is nothing to read, or one of two files is missing.
        """
        languages = self.options.languages
        left_out: list[SourcePiece] = []
        names = source_files(self.source, self._takes, left_out, self.told.append)
        return [self._piece(name, languages) for name in names
                # The second file of a pair is read with the first.
                if not (languages and _ending(name) == languages[1])] + left_out

    def _takes(self, name: str) -> bool:
        return self.takes(name) or _ending(name) in self.options.languages

    def _piece(self, name: str, languages: tuple[str, ...]) -> SourcePiece:
        size_bytes = self.source.file(name).stat().st_size
        if not (languages and _ending(name) == languages[0]):
            if not self.takes(name):
                raise UserError(f"source {self.source.name}: {name}: is no .tsv and no .tmx file; set "
                                "languages to the endings of two files of lines, as [en, ko]")
            return SourcePiece(self.format, name, 0, size_bytes, size_bytes)
        stem, suffix = _stem(name)
        other = f"{stem}.{languages[1]}{suffix}"
        if not self.source.file(other).is_file():
            raise UserError(f"source {self.source.name}: {name}: has no {other} beside it; put it there")
        return SourcePiece(self.format, name, 0, size_bytes, size_bytes, (other,))

    @classmethod
    def items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        """Yield the file: its time limit is one for each document."""
        yield SourceItem(job.name, lambda: cls.documents(job))

    @classmethod
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        options: ParallelOptions = job.options
        gathered: list[str] = []
        place = ""
        languages: tuple[str, ...] = options.languages
        for found in _pairs(job):
            if isinstance(found, Broken):
                yield found
                continue
            number, source, target = found
            place = place or f"{job.name}:{number}"
            gathered.append(_filled(options, source, target))
            if len(gathered) == options.pairs:
                yield Raw("\n\n".join(gathered), place, _columns(languages))
                gathered, place = [], ""
        if gathered:
            yield Raw("\n\n".join(gathered), place, _columns(languages))


def _columns(languages: tuple[str, ...]) -> dict[str, Any]:
    return {"language_pair": "-".join(languages)} if languages else {}


def _filled(options: ParallelOptions, source: str, target: str) -> str:
    names = [given or code for given, code in zip(options.names, options.languages or ("", ""), strict=True)]
    return options.template.format(source=source, target=target, source_language=names[0],
                                   target_language=names[1])


def _stem(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    suffix = path.suffix if path.suffix.lower() in COMPRESSED else ""
    return name.removesuffix(suffix).rpartition(".")[0], suffix


def _ending(name: str) -> str:
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix[1:]


def _pairs(job: ReadingJob) -> Iterator[tuple[int, str, str] | Broken]:
    if job.piece.beside:
        yield from _of_two_files(job)
        return
    ending = _ending(job.piece.file).lower()
    with unpacked(job.file) as stream:
        if ending == "tmx":
            yield from _of_tmx(stream, job)
            return
        for number, line in enumerate(_text_lines(stream, job), 1):
            cells = line.rstrip("\r").split("\t")
            first, second = job.options.columns
            if max(first, second) >= len(cells):
                reason = f"has {len(cells)} columns, and {max(first, second) + 1} are needed"
                yield _no_pair(job, number, reason, line)
            elif not (cells[first].strip() and cells[second].strip()):
                yield _no_pair(job, number, "has an empty side", line)
            else:
                yield number, cells[first].strip(), cells[second].strip()


def _of_two_files(job: ReadingJob) -> Iterator[tuple[int, str, str] | Broken]:
    other = job.root / job.piece.beside[0]
    # Counted before the first pair is yielded: a shift would pair every line behind it wrongly.
    counts = [_num_lines(file, job) for file in (job.file, other)]
    if counts[0] != counts[1]:  # which line is missing nobody knows, and all behind it are paired wrongly
        raise BadRecord("pair", f"has {counts[0]:,} lines and {job.piece.beside[0]} {counts[1]:,}; nothing "
                                "of them is read; mend them")
    with unpacked(job.file) as ours, unpacked(other) as theirs:
        lines = [_text_lines(ours, job), _text_lines(theirs, job, other.stat().st_size)]
        number = 0
        while True:
            number += 1
            source, target = (next(side, None) for side in lines)
            if source is None or target is None:
                return
            if source.strip() and target.strip():
                yield number, source.strip(), target.strip()
            elif source.strip() or target.strip():
                yield _no_pair(job, number, "has an empty side", source + "\t" + target)


def _num_lines(file: Path, job: ReadingJob) -> int:
    with unpacked(file) as stream:
        return sum(1 for _ in split_lines(blocks_within(stream, file.stat().st_size),
                                          job.options.document_bytes))


def _of_tmx(stream: IO[bytes], job: ReadingJob) -> Iterator[tuple[int, str, str] | Broken]:
    from lxml import etree

    wanted = [language.lower() for language in job.options.languages]
    number = 0
    try:
        for _, unit in etree.iterparse(stream, tag="tu", resolve_entities=False, no_network=True,
                                       load_dtd=False, huge_tree=False):
            number += 1
            sides: dict[str, str] = {}
            for variant in unit.iter("tuv"):
                code = (variant.get(_XML_LANGUAGE) or variant.get("lang") or "").lower()
                segment = variant.find("seg")
                text = " ".join("".join(segment.itertext()).split()) if segment is not None else ""
                sides.setdefault(code, text)
                # "en-GB" answers to "en" too; the first variant of a language counts.
                sides.setdefault(code.partition("-")[0], text)
            pair = ([sides.get(code, "") for code in wanted] if wanted
                    else [text for code, text in sides.items() if "-" not in code][:2])
            if len(pair) == 2 and all(pair):
                yield number, pair[0], pair[1]
            else:
                yield _no_pair(job, number, f"has no pair of {' and '.join(wanted) or 'two languages'}", "")
            # Units that are done are taken out of the tree, which would otherwise hold the whole file in the
            # end.
            unit.clear()
            while unit.getprevious() is not None:
                del unit.getparent()[0]
    except etree.XMLSyntaxError as e:
        raise BadRecord("xml", f"is no TMX behind unit {number} ({str(e)[:120]}); what came before is read"
                        ) from None


def _text_lines(stream: IO[bytes], job: ReadingJob, packed_bytes: int | None = None) -> Iterator[str]:
    """Yield lines of a stream.

    Raises:
        BadRecord: one of them is no UTF-8, or too long.
    """
    limit_bytes = job.options.document_bytes
    blocks = blocks_within(stream, packed_bytes or job.piece.size_bytes)
    for number, line in enumerate(split_lines(blocks, limit_bytes), 1):
        if len(line) > limit_bytes:
            raise BadRecord("too_long", f"has a line {number} of more than {limit_bytes:,} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise BadRecord("utf8", f"has a line {number} that is not UTF-8; what came before is read"
                            ) from None


def _no_pair(job: ReadingJob, number: int, reason: str, line: str) -> Broken:
    return job.broken(BadRecord("pair", reason, content=line[:1000].encode()), f"{job.name}:{number}")
