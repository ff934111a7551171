"""Which files are read, and in which parts: spans that several processes can read on their own."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from megatron_sov.base import sealed
from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.documents.records import BadRecord
from megatron_sov.base.errors import UserError, download_dataset, first_line, fix_missing, visible

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def cut_at_blank_lines(blocks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Cut a stream of UTF-8 bytes into pieces of at most `limit_bytes`; joined, the pieces give the stream.

    A cut stands behind the last blank line that fits, else behind the last line, else the last space, else
    between characters.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        start = 0
        # what is left is at most the limit, and may be joined by the next block
        while len(buffer) - start > limit_bytes:
            end = cut_position(buffer, start, limit_bytes)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def cut_position(buffer: bytes, start: int, limit_bytes: int) -> int:
    """Return where to cut `buffer` behind `start`, at most `limit_bytes` further."""
    stop = start + limit_bytes
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = buffer.rfind(separator, start, stop)
        if found >= 0:
            return found + len(separator)
    end = stop
    while end > start + 1 and buffer[end] & 0xC0 == 0x80:  # a continuation byte: the character began earlier
        end -= 1
    return end


def cut_text(text: str, limit_bytes: int) -> Iterator[str]:
    for piece in cut_at_blank_lines([text.encode()], limit_bytes):
        yield piece.decode()


KEPT, REJECTED = "kept.jsonl", "rejected.jsonl"
"""Samples that passed all checks, and those that did not."""


def is_synthesis(names: Iterable[str]) -> bool:
    """Return whether a folder with such files is one of synthesis, of which `KEPT` alone is data."""
    return {KEPT, REJECTED} <= set(names)


WHOLE_FILE_BYTES = 1_000_000
DOCUMENT_BYTES = 200_000
JSONL_SUFFIXES = frozenset([".jsonl", ".ndjson"])
TEXT_SUFFIXES = JSONL_SUFFIXES | frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".js", ".jsx", ".ts",
    ".tsx", ".mjs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift", ".cs", ".sh", ".bash",
    ".sql", ".cmake", ".html", ".htm", ".css", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv",
    ".tsv", ".log", ".srt",
])
"""Endings of the files that are read from a folder; a file that is named itself is read
whatever its ending."""
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIXES = frozenset([".arrow", ".feather"])
"""Of Arrow files and streams, as `save_to_disk` writes them."""
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
JSON_SUFFIX = ".json"
"""Of a list of records, or of lines of them; anything else in JSON is no data."""
RECORD_SUFFIXES = JSONL_SUFFIXES | ARROW_SUFFIXES | {PARQUET_SUFFIX}
"""Endings of files of records: a folder that holds one is a dataset."""
VERSION_CONTROL = frozenset(["CVS", "__MACOSX"])
"""Folders that hold no files of the user's, beside those with a leading dot."""
COMPRESSED_SUFFIXES = frozenset([".gz", ".zst"])
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Stands at the start of some files and is no text."""
SPAN_BYTES = 8 << 20
"""Part of a large file that is read on its own; text files are cut into documents anew in each."""
_BLOCK_BYTES = 1 << 20
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval", "evaluation")}
"""Split -> the words for it in names of files and folders (huggingface/datasets, `data_files.py`); what has
none of them is `train`."""
_ABOUT = re.compile(r"(readme|licen[sc]e|copying|copyright|notice|citation|changelog|contributing|authors|"
                    r"contributors|code_of_conduct|security|datasheet|data_?card|dataset_?card|requirements)"
                    r"([-_.].*)?", re.IGNORECASE)
"""Names of files that say something of a dataset and are no part of it."""
_MOST_TOLD = 4
_MOST_ENDINGS = 8


@dataclass(frozen=True)
class FileSpan:
    """A part of a file that holds whole documents."""

    file: Path
    start: int
    """First byte; of a Parquet file the first row group."""
    stop: int
    """Byte, or row group, behind the last."""
    document_bytes: int
    """Longest document of a text file."""
    size_bytes: int

    @property
    def compression(self) -> str:
        suffix = self.file.suffix.lower()
        return suffix if suffix in COMPRESSED_SUFFIXES else ""

    @property
    def suffix(self) -> str:
        """Return the ending that says what the file holds, without that of a compression."""
        return (Path(self.file.stem) if self.compression else self.file).suffix.lower()


MEDIA_CORPUS, CORPUS_RECORDS = "media_corpus", "records.jsonl"
"""Kind of the artifact that `sov-data encode-media` writes, and its file of records."""


def media_corpus_of(path: Path) -> Path | None:
    """Return the media corpus that a path is, or lies in; None: none."""
    for folder in (path, path.absolute().parent):
        # its records first: text may lie beside a `manifest.json` that is another program's
        complete = all((folder / name).is_file() for name in (CORPUS_RECORDS, MANIFEST))
        if complete and read_manifest(folder).kind == MEDIA_CORPUS:
            return folder
    return None


def _refuse_missing(path: Path) -> NoReturn:
    """Raise `UserError` for a path that does not exist, with what the user may have meant."""
    if "://" in str(path) or re.match(r"(https?|s3|gs|hf):/", str(path)):
        raise UserError(f"{path}: is an address, and nothing is downloaded here; copy it first (aws s3 "
                        "cp, gsutil cp, hf download, wget) and pass the file or folder")
    near = path.parent.glob("*")
    if split := [one.name for one in near if one.name.startswith(f"{path.name} ")]:
        raise UserError(f"{path}: does not exist; {split[0]!r} does: put a name with a blank in quotes")
    is_file = _is_text(path.name) or is_records(path.name) or _is_json(path.name)
    hint = "" if is_file else download_dataset(path)
    raise UserError(f"{path}: does not exist; pass a text file, a .jsonl, .json, .parquet or .arrow "
                    f"file, or a folder of them{hint}", fix_missing(path, is_data=not is_file))


def list_files(path: Path, tell: Callable[[str], object] = lambda sentence: None) -> list[Path]:
    """Return the files to read at `path`: the file itself, or a folder's, recursive and sorted.

    Of a folder the text files are read and the files of records. Hidden files and folders are passed over,
    and so are files with other endings; in a folder with records also those that describe it (README.md,
    LICENSE) and JSON that is no list of records. Of a folder of `sov-data synth` the samples that were kept
    are read, and nothing else.

    Args:
        path: a file or a folder.
        tell: is given a sentence on what is passed over.

    Raises:
        UserError: the path does not exist, or the folder holds nothing to read.
    """
    # a file that is named is read with any ending; endings choose within folders alone
    if path.is_file():
        return [path]
    if not path.is_dir():
        _refuse_missing(path)
    left_out: list[Path] = []
    names = {file: file.relative_to(path).as_posix() for file in map(Path, walk_files(path, left_out))}
    hidden = [one.relative_to(path).as_posix() for one in left_out if is_hidden(one.name)]
    if left_out := [one for one in left_out if not is_hidden(one.name)
                    and (one.is_dir() or _is_text(one.name) or is_records(one.name))]:
        tell(visible(f"{path}: {len(left_out):,} left out; the first: {left_out[0]} "
                     f"{why_left_out(left_out[0])}"))
    texts = [file for file, name in names.items() if _is_text(name)]
    records = [file for file, name in names.items() if is_records(name)]
    lists = [file for file, name in names.items() if _is_json(name)]
    # README and the like: left out of a folder with records, texts as others in one without
    about = [file for file in texts if is_about(names[file])]
    # only JSON besides what describes it: a list of records, perhaps; its beginning decides
    if not records and len(about) == len(texts):
        records = [file for file in lists if holds_records(file)]
    if records:
        lists = [file for file in lists if holds_records(file)]
        found = {*records, *lists, *texts} - set(about)
    else:
        found = set(texts)
    if not found:
        raise UserError(f"{path}: holds no text file and no records (endings such as .txt, .md, .py, "
                        ".jsonl, .jsonl.gz, .json, .parquet, .arrow are read); pass a folder with text")
    # by parts of the path and not by its text: the order is the same on every machine and decides all that
    # follows
    kept = sorted(found, key=lambda p: p.relative_to(path).parts)
    sentences = [passed_over([name for file, name in names.items() if file not in found], hidden),
                 *(_of_a_dataset([names[file] for file in kept]) if records else ())]
    if sentence := "; ".join(filter(None, sentences)):
        tell(visible(f"{path}: {sentence}"))
    return kept


def refuse_tables(path: Path, option: str) -> None:
    """Refuse a table, or a folder, where JSON lines are read.

    Raises:
        UserError: it is one.
    """
    if path.is_dir() or path.suffix.lower() in {*ARROW_SUFFIXES, PARQUET_SUFFIX, ".csv", ".tsv"}:
        form = "a folder" if path.is_dir() else f"a table ({path.suffix})"
        raise UserError(f"{option} {path}: is {form}, and JSON lines are read; write its rows into a .jsonl "
                        "file, e.g. with to_json of `datasets`")


def walk_files(folder: Path, left_out: list[Path]) -> Iterator[str]:
    """Yield the ordinary files below a folder, and those that links lead to, wherever they lie.

    Hidden files and folders, and those of version control, are passed over; of a folder of `sov-data synth`
    the samples that were kept are read, and nothing else.  A folder is walked once, links to folders last, so
    that no circle of links is without end.

    Args:
        folder: the folder.
        left_out: receives what is hidden (`is_hidden`), and what a name stands for and cannot be read
            (`why_left_out`).

    Raises:
        UserError: a folder cannot be listed.
    """
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    seen: set[str] = set()
    root = os.path.realpath(folder)
    waiting = [os.fspath(folder)]
    while waiting:
        links: list[str] = []
        for top in waiting:
            for where, folders, files in os.walk(top, onerror=refuse):
                # a link to a folder above, or to one that was walked, would be read again and again
                real = os.path.realpath(where)
                if real in seen or root.startswith(f"{real.rstrip('/')}/"):
                    left_out.append(Path(where))
                    folders[:] = []
                    continue
                seen.add(real)
                # rejected samples, journals and reports are in the same folder and are no data
                if is_synthesis(files):
                    folders[:], files = [], [KEPT]
                left_out += [Path(where, name) for name in sorted([*folders, *files]) if is_hidden(name)]
                folders[:] = sorted(f for f in folders if not is_hidden(f))
                links += [path for f in folders if os.path.islink(path := os.path.join(where, f))]
                for path in (os.path.join(where, file) for file in sorted(files) if not is_hidden(file)):
                    if os.path.isfile(path):
                        yield path
                    else:
                        left_out.append(Path(path))
        # links last: a folder that is also there by its own name keeps that name in messages
        waiting = links


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in VERSION_CONTROL


def why_left_out(path: Path) -> str:
    if path.is_dir():
        return "leads to a folder that is read under another name, or that holds this one"
    return "is a link that leads to nothing" if not path.exists() else "is no ordinary file"


def is_about(name: str) -> bool:
    return bool(_ABOUT.fullmatch(name.rpartition("/")[2]))


def has_word(name: str, words: Iterable[str]) -> bool:
    """Return whether one of some words stands in a file's path on its own."""
    return bool(re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(map(re.escape, words))})(?:[-._ 0-9/]|$)",
                          name.lower()))


def is_records(name: str) -> bool:
    """Return whether a file holds records, by its name; what `map` and `filter` left beside a saved dataset
    does not."""
    suffix = _ending(name)
    return suffix in RECORD_SUFFIXES and not (suffix in ARROW_SUFFIXES
                                              and name.rpartition("/")[2].startswith("cache-"))


def _is_text(name: str) -> bool:
    return _ending(name) in TEXT_SUFFIXES - JSONL_SUFFIXES


def _is_json(name: str) -> bool:
    return _ending(name) == JSON_SUFFIX


def _ending(name: str) -> str:
    """Return what a file's name says that it holds, without the ending of a compression."""
    path = Path(name)
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def passed_over(others: Sequence[str], hidden: Sequence[str]) -> str:
    """Return, in words, what of a folder is not read; "" where all of it is.

    Args:
        others: names of the files that are not read.
        hidden: names of hidden files and folders.
    """
    if len(others) <= _MOST_TOLD:
        # few files are named; of many the endings say more
        which = sorted(others)
    else:
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in others).most_common()
        rest = sum(count for _, count in endings[_MOST_ENDINGS:])
        which = [f"{count:,} {ending}" for ending, count in endings[:_MOST_ENDINGS]]
        which += [f"{rest:,} others"] if rest else []
    first = [*sorted(hidden)[:_MOST_TOLD], *(["..."] if len(hidden) > _MOST_TOLD else [])]
    what = "file" if len(others) == 1 else "files"
    parts = [f"{len(all_):,} {what} ({', '.join(told)})"
             for all_, what, told in ((others, what, which), (hidden, "hidden", first)) if all_]
    return f"passed over {' and '.join(parts)}" if parts else ""


def _of_a_dataset(kept: list[str]) -> Iterator[str]:
    """Yield what a dataset has that may not be meant, in words."""
    if plain := [name for name in kept if _is_text(name)]:
        shown = ", ".join([*plain[:_MOST_TOLD], *(["..."] if len(plain) > _MOST_TOLD else [])])
        yield (f"beside records it reads {len(plain):,} files of plain text ({shown}) as documents; pass the "
               "files of records to leave them out")
    splits = [split for split, words in SPLITS.items() if any(has_word(name, words) for name in kept)]
    if len(splits) > 1:
        yield (f"it reads the splits {', '.join(splits)} as one source; pass the files of one split to keep "
               "the others out")


def plan_units(files: Iterable[Path], unit_bytes: int = SPAN_BYTES) -> Iterator[tuple[FileSpan, ...]]:
    """Yield units of work of about `unit_bytes` on the disk: several small files, or a part of a large one.

    A compressed file, a list in JSON and an Arrow file are one span whatever their size, since they can only
    be read from their start.
    """
    group: list[FileSpan] = []
    size_bytes = 0
    for file in files:
        for span in spans_of(file, unit_bytes):
            if group and size_bytes + span.size_bytes > unit_bytes:
                yield tuple(group)
                group, size_bytes = [], 0
            group.append(span)
            size_bytes += span.size_bytes
    if group:
        yield tuple(group)


def spans_of(file: Path, span_bytes: int = SPAN_BYTES, *, read_as: str = "") -> Iterator[FileSpan]:
    """Yield the spans of one file, of about `span_bytes` each; joined they are the file.

    Args:
        file: the file.
        span_bytes: see above.
        read_as: ending that says what it holds, as ".jsonl"; "": its own does.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        size_bytes = file.stat().st_size
        whole = FileSpan(file, 0, size_bytes,
                         max(size_bytes, 1) if size_bytes <= WHOLE_FILE_BYTES else DOCUMENT_BYTES, size_bytes)
        suffix = read_as or whole.suffix
        if suffix == PARQUET_SUFFIX:
            yield from _row_groups(whole, span_bytes)
        elif (whole.compression or suffix == JSON_SUFFIX or suffix in ARROW_SUFFIXES
              or size_bytes <= max(span_bytes, WHOLE_FILE_BYTES)):
            yield whole
        else:
            # each span begins where a record or a document does, so that processes read them alone
            starts = list(_starts(whole, span_bytes, suffix))
            for start, stop in zip(starts, [*starts[1:], size_bytes], strict=True):
                yield FileSpan(file, start, stop, whole.document_bytes, stop - start)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); "
                        "check the path and its permissions") from e


def _starts(whole: FileSpan, span_bytes: int, suffix: str) -> Iterator[int]:
    """Yield where spans of a large file begin: at a line of JSONL, behind a blank line of text."""
    start = 0
    with open(whole.file, "rb") as f:
        while start < whole.stop:
            yield start
            start += span_bytes
            f.seek(start)
            if suffix in JSONL_SUFFIXES:
                # to the end of the line that the boundary fell into; in blocks, since a line may be larger
                # than memory
                while (block := f.readline(_BLOCK_BYTES)) and not block.endswith(b"\n"):
                    start += len(block)
                start += len(block)
            elif len(window := f.read(DOCUMENT_BYTES + 1)) > DOCUMENT_BYTES:
                start += cut_position(window, 0, DOCUMENT_BYTES)
            else:
                return


def _row_groups(whole: FileSpan, span_bytes: int) -> Iterator[FileSpan]:
    """Yield runs of row groups; a file that is no Parquet is one span, and found out where it is read."""
    try:
        metadata = open_parquet(whole.file).metadata
    except BadRecord:
        yield whole
        return
    first, size_bytes = 0, 0
    for i in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(i).total_byte_size
        if size_bytes >= span_bytes or i == metadata.num_row_groups - 1:
            yield FileSpan(whole.file, first, i + 1, whole.document_bytes, size_bytes)
            first, size_bytes = i + 1, 0


def open_parquet(file: Path) -> Any:
    """Return a Parquet file opened by pyarrow; a string that many rows of a page share is held in memory
    once, as it is in the file.

    Raises:
        BadRecord: it is not one, or only a part of one.
    """
    import pyarrow

    try:
        opened = sealed.open_parquet(file)
        leaves = [opened.schema.column(i) for i in range(len(opened.schema))]
        # read as dictionaries: a page that repeats one string of megabytes would else take a copy for each
        # row
        strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"
                   and leaf.logical_type.type in ("STRING", "NONE")]
        return sealed.open_parquet(file, metadata=opened.metadata, read_dictionary=strings)
    except UserError as e:
        raise BadRecord("parquet", str(e).removeprefix(f"{file}: ")) from None
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as e:
        reason = first_line(e)
        raise BadRecord("parquet",
                        f"is not a Parquet file, or only a part of one ({reason}); fetch it again") from None


@contextlib.contextmanager
def arrow_batches(file: Path) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """Yield the names of an Arrow file's or stream's columns, and its batches.

    Raises:
        BadRecord: it is neither, or damaged; also from the batches.
    """
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.OSFile(str(file)) as opened:
            begin = opened.read(6)
            # a file begins with its magic, a stream with a continuation mark, one of before 2019 with a
            # length
            is_file, is_old = begin == b"ARROW1", begin[:4] != _STREAM_END[:4]
            opened.seek(0)
            reader = ipc.open_file(opened) if is_file else ipc.open_stream(opened)
            batches = (map(reader.get_batch, range(reader.num_record_batches)) if is_file
                       else _stream(reader, opened, is_old))
            yield reader.schema.names, (_sound_batch(batch) for batch in batches)
    except (pyarrow.ArrowException, OSError) as e:
        reason = first_line(e)[:200]
        raise BadRecord("arrow", f"is no Arrow file, or only a part of one ({reason}); what came before "
                                 "is read; fetch it again") from None


def _stream(reader: Any, opened: Any, is_old: bool) -> Iterator[Any]:
    """Yield the batches of a stream, and look whether it has its end: nothing else shows that it was cut off
    between two of them. An old one's end, of before 2019, cannot be told from data."""
    import pyarrow

    yield from reader
    opened.seek(max(0, opened.size() - len(_STREAM_END)))
    if not is_old and opened.read() != _STREAM_END:
        raise pyarrow.ArrowInvalid("the end of the stream is missing")


def _sound_batch(batch: Any) -> Any:
    batch.validate(full=True)
    return batch


def open_bytes(file: Path, compression: str = "") -> IO[bytes]:
    """Open a file that may be compressed (".gz", ".zst") for reading."""
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if compression == ".zst":
        return io.BufferedReader(ZstdFile(file))
    return open(file, "rb")


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a `.zst` file of one or more frames; wrap it in `io.BufferedReader`."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        self._stream = pyarrow.input_stream(os.fspath(file), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer`; returns the bytes written, 0 at the end.

        Raises:
            EOFError: the file ends inside a frame, or its data are damaged.
        """
        try:
            return int(self._stream.readinto(buffer))
        except OSError as e:
            if e.errno:  # of the disk; Arrow's own errors have no number
                raise
            raise EOFError(str(e)) from None

    def close(self) -> None:
        self._stream.close()
        super().close()


def holds_records(file: Path) -> bool:
    """Return whether a JSON file is a list, or lines of records, by its beginning: one object that goes on
    over several lines, or is all that the file holds, says something of data and is none."""
    try:
        with open_bytes(file, file.suffix.lower() if file.suffix.lower() in COMPRESSED_SUFFIXES else "") as f:
            head = f.read(_BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    except (OSError, EOFError, zlib.error):
        return True  # it is refused where it is read
    line, _, rest = head.partition(b"\n")
    # `[{` or a first line that is a whole object with another one below
    is_list = head[:1] == b"[" and head[1:].lstrip()[:1] == b"{"
    return is_list or (line[:1] == b"{" and line.rstrip()[-1:] == b"}" and rest.lstrip()[:1] == b"{")
