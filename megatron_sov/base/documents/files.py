"""List the data files at a path, and split files into spans that separate processes can read."""

import gzip
import io
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from megatron_sov.base import sealed
from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.documents.records import BadRecord
from megatron_sov.base.errors import (
    Fix, UserError, escape_controls, first_error_line, fix_missing, suggest_download)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ACCEPTED_SAMPLES, REJECTED_SAMPLES = "kept.jsonl", "rejected.jsonl"
"""Files with samples that passed or failed the checks in `sov-data synth`."""
WHOLE_FILE_BYTES = 1_000_000  # a text file up to this size is one document
DOCUMENT_BYTES = 200_000  # longest document to cut from a larger one
JSONL_SUFFIXES = frozenset([".jsonl", ".ndjson"])
TEXT_SUFFIXES = JSONL_SUFFIXES | frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".js", ".jsx", ".ts",
    ".tsx", ".mjs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift", ".cs", ".sh", ".bash",
    ".sql", ".cmake", ".html", ".htm", ".css", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv",
    ".tsv", ".log", ".srt"])
"""Endings read from a folder; a file passed by name may have any ending."""
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIXES = frozenset([".arrow", ".feather"])
"""Endings for Arrow files and streams, as written by `save_to_disk` in Hugging Face datasets."""
JSON_SUFFIX = ".json"
"""Ending for a JSON list or JSON lines; other JSON is not data."""
RECORD_SUFFIXES = JSONL_SUFFIXES | ARROW_SUFFIXES | {PARQUET_SUFFIX}
"""Endings for record files; a folder with a record file is a dataset."""
VERSION_CONTROL = frozenset(["CVS", "__MACOSX"])
"""Folders without user data, in addition to hidden folders."""
COMPRESSED_SUFFIXES = frozenset([".gz", ".zst"])
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Bytes before the text in some files; not part of the text."""
SPAN_BYTES = 8 << 20
"""Span size in a large file; documents in text files are cut within each span."""
_BLOCK_BYTES = 1 << 20
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval", "evaluation")}
"""Split -> words in names (huggingface/datasets, `data_files.py`); other files belong to `train`."""
_ABOUT = re.compile(r"(readme|licen[sc]e|copying|copyright|notice|citation|changelog|contributing|authors|"
                    r"contributors|code_of_conduct|security|datasheet|data_?card|dataset_?card|requirements)"
                    r"([-_.].*)?", re.IGNORECASE)
"""File names that describe a dataset and contain no data."""
_MAX_NAMES = 4
_MAX_ENDINGS = 8
MEDIA_CORPUS, CORPUS_RECORDS = "media_corpus", "records.jsonl"
"""Artifact kind that `sov-data encode-media` writes, and the name of its record file."""


def cut_at_blank_lines(blocks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Cut a UTF-8 byte stream into pieces of at most `limit_bytes`; the joined pieces equal the stream.

    Cut after the last blank line that fits, otherwise the last line, the last space, or between characters.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        start = 0
        # the rest (at most the limit) may continue in the next block
        while len(buffer) - start > limit_bytes:
            end = find_cut(buffer, start, limit_bytes)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def find_cut(buffer: bytes, start: int, limit_bytes: int) -> int:
    """Return the offset at which to cut `buffer`, at most `limit_bytes` after `start`."""
    stop = start + limit_bytes
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        index = buffer.rfind(separator, start, stop)
        if index >= 0:
            return index + len(separator)
    end = stop
    while end > start + 1 and buffer[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        end -= 1
    return end


def cut_text(text: str, limit_bytes: int) -> Iterator[str]:
    for piece in cut_at_blank_lines([text.encode()], limit_bytes):
        yield piece.decode()


@dataclass(frozen=True)
class FileSpan:
    """A file range that contains whole documents."""

    file: Path
    start: int
    """First byte; in a Parquet file the first row group."""
    stop: int
    """End (exclusive) in bytes or row groups."""
    document_bytes: int
    """Longest document to cut from a text file."""
    size_bytes: int
    read_as: str = ""
    """Ending that declares the content; "": the file's own ending."""

    @property
    def compression(self) -> str:
        suffix = self.file.suffix.lower()
        return suffix if suffix in COMPRESSED_SUFFIXES else ""

    @property
    def suffix(self) -> str:
        """Return the content's ending, without the compression's ending."""
        return self.read_as or (Path(self.file.stem) if self.compression else self.file).suffix.lower()


def find_media_corpus(path: Path) -> Path | None:
    """Return the media corpus at `path` or in a parent folder; None: no media corpus."""
    for folder in (path, path.absolute().parent):
        # check the records first: another program's `manifest.json` may be next to a text file
        is_complete = all((folder / name).is_file() for name in (CORPUS_RECORDS, MANIFEST))
        if is_complete and read_manifest(folder).kind == MEDIA_CORPUS:
            return folder
    return None


def _refuse_missing(path: Path) -> NoReturn:
    """Raise `UserError` for a missing path, with a guess at the intended path."""
    if "://" in str(path) or re.match(r"(https?|s3|gs|hf):/", str(path)):
        address = re.sub(r":/+", "://", str(path), count=1)  # a `Path` has lost a slash
        fix = Fix(words={address: path.name}, before=(f"wget {shlex.quote(address)}",))
        raise UserError(f"{address}: is an address, and nothing is downloaded here; copy it first (aws s3 "
                        "cp, gsutil cp, hf download, wget) and pass the file or folder",
                        fix if address.startswith("http") else None)
    siblings = [sibling.name for sibling in path.parent.glob("*")]
    if longer := [name for name in siblings if name.startswith(f"{path.name} ")]:
        # a shell has split the name: its other parts are words of the command line
        rest = longer[0].removeprefix(path.name).split()
        raise UserError(f"{path}: does not exist; {longer[0]!r} does: put a name with a blank in quotes",
                        Fix(words={str(path): str(path.with_name(longer[0]))}, left_out=tuple(rest)))
    is_file = _is_text(path.name) or is_records(path.name) or is_json(path.name)
    hint = "" if is_file else suggest_download(path, is_data=True)
    raise UserError(f"{path}: does not exist; pass a text file, a .jsonl, .json, .parquet or .arrow "
                    f"file, or a folder of them{hint}", fix_missing(path, is_data=not is_file))


def list_files(path: Path, tell: Callable[[str], object] = lambda sentence: None) -> list[Path]:
    """Return the data files at `path`: the file itself, or the sorted files below a folder.

    A folder's data files are text files and files of records. Hidden files and other endings are skipped. If
    the folder contains records, files that describe the dataset (README.md, LICENSE) and JSON that is not a
    list of records are skipped too. In an output of `sov-data synth`, only `ACCEPTED_SAMPLES` is data.

    Args:
        tell: called with sentences about skipped files.

    Raises:
        UserError: the path does not exist, or the folder contains no data files.
    """
    # a file passed by name may have any ending
    if path.is_file():
        return [path]
    if not path.is_dir():
        _refuse_missing(path)
    skipped: list[Path] = []
    names = {file: file.relative_to(path).as_posix() for file in map(Path, walk_files(path, skipped))}
    hidden = [entry.relative_to(path).as_posix() for entry in skipped if is_hidden(entry.name)]
    unreadable = [entry for entry in skipped if not is_hidden(entry.name)
                  and (entry.is_dir() or _is_text(entry.name) or is_records(entry.name))]
    if unreadable:
        tell(escape_controls(f"{path}: {len(unreadable):,} left out; the first: {unreadable[0]} "
                             f"{explain_unreadable(unreadable[0])}"))
    texts = [file for file, name in names.items() if _is_text(name)]
    records = [file for file, name in names.items() if is_records(name)]
    lists = [file for file, name in names.items() if is_json(name)]
    # README and similar files are data only in a folder without records
    about = [file for file in texts if is_description(names[file])]
    # besides descriptions only JSON files, which may be lists of records
    if not records and len(about) == len(texts):
        records = [file for file in lists if contains_records(file)]
    if records:
        lists = [file for file in lists if contains_records(file)]
        data = {*records, *lists, *texts} - set(about)
    else:
        data = set(texts)
    if not data:
        raise UserError(f"{path}: holds no text file and no records (endings such as .txt, .md, .py, "
                        ".jsonl, .jsonl.gz, .json, .parquet, .arrow are read); pass a folder with text")
    # sort by path components: later steps depend on an order that is equal on every machine
    files = sorted(data, key=lambda p: p.relative_to(path).parts)
    sentences = [format_skipped([name for file, name in names.items() if file not in data], hidden),
                 *(_describe_dataset([names[file] for file in files]) if records else ())]
    if sentence := "; ".join(filter(None, sentences)):
        tell(escape_controls(f"{path}: {sentence}"))
    return files


def refuse_tables(path: Path, option: str) -> None:
    """Raise `UserError` for a table or folder, where an option takes JSON lines."""
    if path.is_dir() or path.suffix.lower() in {*ARROW_SUFFIXES, PARQUET_SUFFIX, ".csv", ".tsv"}:
        form = "a folder" if path.is_dir() else f"a table ({path.suffix})"
        raise UserError(f"{option} {path}: is {form}, and JSON lines are read; write its rows into a .jsonl "
                        "file, e.g. with to_json of `datasets`")


def check_lines_files(files: Sequence[Path]) -> None:
    """Check the files of JSON lines in `--input`, each of which gets an output file `name_lines`. Raises
    `UserError`: a file is a table or a folder, or two output files would have the same name."""
    for file in files:
        refuse_tables(file, "--input")
    for name, num_files in Counter(map(name_lines, files)).items():
        if num_files > 1:
            raise UserError(f"--input: {num_files} files would be written to {name}; rename them")


def walk_files(folder: Path, skipped: list[Path]) -> Iterator[str]:
    """Yield the regular files below a folder, including files reached through links.

    Hidden files, hidden folders and version control are skipped, and in an output of `sov-data synth` all
    files except `ACCEPTED_SAMPLES`. Each folder is walked once, links to folders last, so circular links end.

    Args:
        skipped: receives hidden entries (`is_hidden`) and unreadable entries.

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
                # a link to a parent or to a folder already walked would repeat its files
                real = os.path.realpath(where)
                if real in seen or root.startswith(f"{real.rstrip('/')}/"):
                    skipped.append(Path(where))
                    folders[:] = []
                    continue
                seen.add(real)
                # of `sov-data synth`: rejected samples, journals and reports are not data
                if {ACCEPTED_SAMPLES, REJECTED_SAMPLES} <= set(files):
                    folders[:], files = [], [ACCEPTED_SAMPLES]
                skipped += [Path(where, name) for name in sorted([*folders, *files]) if is_hidden(name)]
                folders[:] = sorted(name for name in folders if not is_hidden(name))
                links += [path for name in folders if os.path.islink(path := os.path.join(where, name))]
                for path in (os.path.join(where, name) for name in sorted(files) if not is_hidden(name)):
                    if os.path.isfile(path):
                        yield path
                    else:
                        skipped.append(Path(path))
        # links last: messages name a folder by the path below `folder`, if any
        waiting = links


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in VERSION_CONTROL


def explain_unreadable(path: Path) -> str:
    if path.is_dir():
        return "leads to a folder that is read under another name, or that holds this one"
    return "is a link that leads to nothing" if not path.exists() else "is not an ordinary file"


def is_description(name: str) -> bool:
    return bool(_ABOUT.fullmatch(name.rpartition("/")[2]))


def has_word(name: str, words: Iterable[str]) -> bool:
    """Return whether a path contains any of `words`, separated from other words."""
    return bool(re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(map(re.escape, words))})(?:[-._ 0-9/]|$)",
                          name.lower()))


def is_records(name: str) -> bool:
    """Return whether a file name belongs to a record file, and not to a cache of `map` or `filter`."""
    suffix = get_ending(name)
    return suffix in RECORD_SUFFIXES and not (suffix in ARROW_SUFFIXES
                                              and name.rpartition("/")[2].startswith("cache-"))


def name_lines(file: Path) -> str:
    """Return a file's name with the ending .jsonl in place of its own and of its compression's."""
    name = file.stem if file.suffix.lower() in COMPRESSED_SUFFIXES else file.name
    return Path(name).with_suffix(".jsonl").name


def _is_text(name: str) -> bool:
    return get_ending(name) in TEXT_SUFFIXES - JSONL_SUFFIXES


def is_json(name: str) -> bool:
    return get_ending(name) == JSON_SUFFIX


def get_ending(name: str) -> str:
    """Return a name's ending in lower case, without the compression's ending."""
    path = Path(name)
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def format_skipped(others: Sequence[str], hidden: Sequence[str]) -> str:
    """Format which entries in a folder were skipped; "": no entry. `others`: names of skipped files;
    `hidden`: names of hidden files and folders."""
    if len(others) <= _MAX_NAMES:
        # name a few files; for many files, count their endings
        examples = sorted(others)
    else:
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in others).most_common()
        num_others = sum(count for _, count in endings[_MAX_ENDINGS:])
        examples = [f"{count:,} {ending}" for ending, count in endings[:_MAX_ENDINGS]]
        examples += [f"{num_others:,} others"] if num_others else []
    parts = []
    if others:
        noun = "file" if len(others) == 1 else "files"
        parts.append(f"{len(others):,} {noun} ({', '.join(examples)})")
    if hidden:
        hidden_names = [*sorted(hidden)[:_MAX_NAMES], *(["..."] if len(hidden) > _MAX_NAMES else [])]
        parts.append(f"{len(hidden):,} hidden ({', '.join(hidden_names)})")
    return f"passed over {' and '.join(parts)}" if parts else ""


def _describe_dataset(names: list[str]) -> Iterator[str]:
    """Yield warnings about probably unintended files in a dataset."""
    if plain := [name for name in names if _is_text(name)]:
        plain_names = ", ".join([*plain[:_MAX_NAMES], *(["..."] if len(plain) > _MAX_NAMES else [])])
        yield (f"beside records it reads {len(plain):,} files of plain text ({plain_names}) as documents; "
               "pass the files of records to leave them out")
    splits = [split for split, words in SPLITS.items() if any(has_word(name, words) for name in names)]
    if len(splits) > 1:
        yield (f"it reads the splits {', '.join(splits)} as one source; pass the files of one split to keep "
               "the others out")


def plan_units(files: Iterable[Path], unit_bytes: int = SPAN_BYTES) -> Iterator[tuple[FileSpan, ...]]:
    """Yield work units with about `unit_bytes` on disk: several small files, or part of a large file.

    A compressed file, a JSON list or an Arrow file is one span of any size: reading it must begin at its
    start.
    """
    group: list[FileSpan] = []
    size_bytes = 0
    for file in files:
        for span in iter_spans(file, unit_bytes):
            if group and size_bytes + span.size_bytes > unit_bytes:
                yield tuple(group)
                group, size_bytes = [], 0
            group.append(span)
            size_bytes += span.size_bytes
    if group:
        yield tuple(group)


def iter_spans(file: Path, span_bytes: int = SPAN_BYTES, *, read_as: str = "") -> Iterator[FileSpan]:
    """Yield a file's consecutive spans with about `span_bytes` each.

    Args:
        span_bytes: approximate size of a span.
        read_as: ending that declares the content, such as ".jsonl"; "": the file's own ending.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        size_bytes = file.stat().st_size
        document_bytes = max(size_bytes, 1) if size_bytes <= WHOLE_FILE_BYTES else DOCUMENT_BYTES
        file_span = FileSpan(file, 0, size_bytes, document_bytes, size_bytes, read_as)
        suffix = file_span.suffix
        if suffix == PARQUET_SUFFIX:
            yield from _iter_row_groups(file_span, span_bytes)
        elif (file_span.compression or suffix == JSON_SUFFIX or suffix in ARROW_SUFFIXES
              or size_bytes <= max(span_bytes, WHOLE_FILE_BYTES)):
            yield file_span
        else:
            # a span begins at a record or document, so that processes can read spans independently
            starts = list(_iter_starts(file_span, span_bytes, suffix))
            for start, stop in zip(starts, [*starts[1:], size_bytes], strict=True):
                yield replace(file_span, start=start, stop=stop, size_bytes=stop - start)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); "
                        "check the path and its permissions") from e


def _iter_starts(span: FileSpan, span_bytes: int, suffix: str) -> Iterator[int]:
    """Yield the spans' start offsets: line starts in JSONL, after blank lines in text."""
    start = 0
    with open(span.file, "rb") as f:
        while start < span.stop:
            yield start
            start += span_bytes
            f.seek(start)
            if suffix in JSONL_SUFFIXES:
                # skip to the end of the line at this offset, in blocks: a line may be larger than memory
                while (block := f.readline(_BLOCK_BYTES)) and not block.endswith(b"\n"):
                    start += len(block)
                start += len(block)
            elif len(window := f.read(DOCUMENT_BYTES + 1)) > DOCUMENT_BYTES:
                start += find_cut(window, 0, DOCUMENT_BYTES)
            else:
                return


def _iter_row_groups(span: FileSpan, span_bytes: int) -> Iterator[FileSpan]:
    """Yield ranges of row groups; a damaged file is a single span, whose reader reports the damage."""
    try:
        metadata = open_parquet(span.file).metadata
    except BadRecord:
        yield span
        return
    first, size_bytes = 0, 0
    for i in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(i).total_byte_size
        if size_bytes >= span_bytes or i == metadata.num_row_groups - 1:
            yield FileSpan(span.file, first, i + 1, span.document_bytes, size_bytes)
            first, size_bytes = i + 1, 0


def open_parquet(file: Path) -> Any:
    """Open a Parquet file with pyarrow; a string repeated within a page is held in memory once. Raises
    `BadRecord`: the file is not Parquet, or truncated."""
    import pyarrow  # not at the top: it is slow to import, and `--help` reads no data

    try:
        opened = sealed.open_sealed_parquet(file)
        leaves = [opened.schema.column(i) for i in range(len(opened.schema))]
        # read strings as dictionaries: otherwise a page that repeats a string of megabytes copies it per row
        strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"
                   and leaf.logical_type.type in ("STRING", "NONE")]
        return sealed.open_sealed_parquet(file, metadata=opened.metadata, read_dictionary=strings)
    except UserError as e:
        raise BadRecord("parquet", str(e).removeprefix(f"{file}: ")) from None
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as e:
        reason = first_error_line(e)
        raise BadRecord("parquet",
                        f"is not a Parquet file, or only a part of one ({reason}); fetch it again") from None


def open_bytes(file: Path, compression: str = "") -> IO[bytes]:
    """Open a file for reading, decompressing ".gz" or ".zst"."""
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    return io.BufferedReader(ZstdFile(file)) if compression == ".zst" else open(file, "rb")


class ZstdFile(io.RawIOBase):
    """Decompressed bytes from a `.zst` file with any number of frames; for use in `io.BufferedReader`."""

    def __init__(self, file: Path) -> None:
        import pyarrow  # not at the top, as in `open_parquet`

        self._stream = pyarrow.input_stream(os.fspath(file), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` and return the byte count, 0 at the end. Raises `EOFError`: a truncated file."""
        try:
            return int(self._stream.readinto(buffer))
        except OSError as e:
            if e.errno:  # an error of the disk; Arrow's own errors have no number
                raise
            raise EOFError(str(e)) from None

    def close(self) -> None:
        self._stream.close()
        super().close()


def contains_records(file: Path) -> bool:
    """Return whether a JSON file begins with a list of objects, or with lines that hold an object each.

    A single object, on one line or several, describes data and is not data.
    """
    try:
        with open_bytes(file, file.suffix.lower() if file.suffix.lower() in COMPRESSED_SUFFIXES else "") as f:
            head = f.read(_BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    except (OSError, EOFError, zlib.error):
        return True  # the reader reports the error
    line, _, rest = head.partition(b"\n")
    # `[{`, or a first line that holds a whole object followed by another object
    is_list = head[:1] == b"[" and head[1:].lstrip()[:1] == b"{"
    return is_list or (line[:1] == b"{" and line.rstrip()[-1:] == b"}" and rest.lstrip()[:1] == b"{")
