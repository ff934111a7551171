"""Reading users' text: files, JSONL and folders as a stream of documents, in bounded memory and a fixed order.

A text file is one document; above `WHOLE_FILE_BYTES` it is cut at blank lines into documents of at most
`DOCUMENT_BYTES`.  A line of a `.jsonl` file is one document: an object with `text`, or with `messages` (a chat).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError

WHOLE_FILE_BYTES = 1_000_000
DOCUMENT_BYTES = 200_000
ROLES = ("system", "user", "assistant", "tool")
TEXT_SUFFIXES = frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".jsonl", ".py", ".pyi", ".c", ".h", ".cc", ".cpp",
    ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".js", ".jsx", ".ts", ".tsx", ".mjs", ".rb",
    ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift", ".cs", ".sh", ".bash", ".sql", ".cmake", ".html", ".htm",
    ".css", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv", ".tsv", ".log", ".srt",
])
"""Endings of the files that are read from a folder; a file that is named itself is read whatever its ending."""
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: plain text, or a chat."""

    where: str
    """Its place for messages: the file, and the line of a JSONL file."""
    text: str = ""
    """The text; empty for a chat."""
    messages: tuple[tuple[str, str], ...] = ()
    """The chat as (role, content) pairs; empty for plain text."""

    def texts(self) -> tuple[str, ...]:
        """Return the pieces of text that users wrote: the text itself, or each message's content."""
        return tuple(content for _, content in self.messages) if self.messages else (self.text,)


def list_files(path: Path) -> list[Path]:
    """Return the files to read at `path`: the file itself, or a folder's text files, recursive and sorted.

    Hidden files and folders are passed over, and so are files whose ending is not in `TEXT_SUFFIXES`.

    Raises:
        UserError: the path does not exist, or the folder holds no text file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; pass a text file, a .jsonl file or a folder of them")
    found = [p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()
             and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise UserError(f"{path}: holds no text file (endings such as .txt, .md, .py, .jsonl are read); pass a folder with text")
    return sorted(found, key=lambda p: p.relative_to(path).parts)


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """Yield the non-empty documents of files, in order.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or has a malformed JSONL line (named by number).
    """
    for file in files:
        try:
            yield from _jsonl(file) if file.suffix.lower() == ".jsonl" else _plain(file)
        except OSError as e:
            raise UserError(f"{file}: cannot be read ({e.strerror}); check the path and its permissions") from e


def _plain(file: Path) -> Iterator[Document]:
    limit_bytes = WHOLE_FILE_BYTES if file.stat().st_size <= WHOLE_FILE_BYTES else DOCUMENT_BYTES
    start_bytes = 0
    with open(file, "rb") as f:
        if f.read(3) != b"\xef\xbb\xbf":  # a byte order mark is no text
            f.seek(0)
        for piece in cut_at_blank_lines(iter(lambda: f.read(_BLOCK_BYTES), b""), limit_bytes):
            text = _decode(piece, str(file), start_bytes)
            start_bytes += len(piece)
            if text.strip():
                yield Document(str(file), text)


def _jsonl(file: Path) -> Iterator[Document]:
    with open(file, "rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                where = f"{file}:{number}"
                document = _parse(_decode(line, where, 0), where)
                if any(text.strip() for text in document.texts()):
                    yield document


def _decode(raw: bytes, where: str, start_bytes: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: is not UTF-8 (byte {raw[e.start]:#04x} at offset {start_bytes + e.start}); "
                        "convert it, e.g. iconv -f CP949 -t UTF-8") from None


def _parse(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where}: is not valid JSON ({e}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a JSON {type(record).__name__}, must be an object with 'text' or 'messages'")
    if "messages" in record:
        document = Document(where, messages=_chat(record["messages"], where))
    elif isinstance(record.get("text"), str):
        document = Document(where, record["text"])
    else:
        raise UserError(f"{where}: has no string field 'text' and no 'messages' (fields: {', '.join(record) or 'none'}); add one")
    for text in document.texts():
        if not _encodable(text):
            raise UserError(f"{where}: holds half of a surrogate pair (an escape such as \\ud800), which is no character; "
                            "remove it")
    return document


def _chat(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a non-empty list of objects with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise UserError(f"{where}: messages[{i}] has role {role!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: messages[{i}].content is {message.get('content')!r}, must be a string")
    return tuple((m["role"], m["content"]) for m in messages)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else True


def cut_at_blank_lines(blocks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Cut a stream of UTF-8 bytes into pieces of at most `limit_bytes`; joined, the pieces give the stream.

    A cut stands behind the last blank line that fits, else behind the last line, else the last space, else between
    characters.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        while len(buffer) > limit_bytes:
            end = _cut_position(buffer, limit_bytes)
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def _cut_position(buffer: bytes, limit_bytes: int) -> int:
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = buffer.rfind(separator, 0, limit_bytes)
        if found >= 0:
            return found + len(separator)
    end = limit_bytes
    while end > 1 and buffer[end] & 0xC0 == 0x80:  # a continuation byte: the character began earlier
        end -= 1
    return end


def cut_text(text: str, limit_bytes: int) -> Iterator[str]:
    """Cut one text as `cut_at_blank_lines` does."""
    for piece in cut_at_blank_lines([text.encode()], limit_bytes):
        yield piece.decode()
