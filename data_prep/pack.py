"""`sov-data pack`: documents to token shards that Megatron-Core and the trainer read by memory map.

Two passes.  The first reads everything, so that a malformed line ends the command before the work and the held-out rule
knows each source; the second encodes batches of documents in worker processes and writes them in the order read, so the
bytes do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.encode import EncodedBatch, Encoder
from data_prep.indexed import SIDECARS, IndexedWriter, token_dtype
from data_prep.splits import HELDOUT, SPLITS, TRAIN, HeldoutRule, document_hash
from megatron_sov.artifacts import ArtifactWriter, new_artifact, read_manifest, refuse_existing
from megatron_sov.documents import Document, list_files, read_documents
from megatron_sov.errors import UserError

HELP = "turn text or chats into token shards"
DESCRIPTION = """Turn text or chats into token shards (.bin and .idx in Megatron-Core's format), one set per source, with a part
of the documents held out. Special tokens that are spelled out in documents stay ordinary text."""
KIND = "tokens"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BATCH_BYTES = 1_000_000
"""Text that a worker is handed at a time."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_encoder: Encoder
"""The worker process's tokenizer, loaded once."""


@dataclass(frozen=True)
class Source:
    """One `--input`."""

    name: str
    """Name in blends, evaluations and folders."""
    path: Path
    """File or folder."""


@dataclass(frozen=True)
class Survey:
    """What the first pass found in a source."""

    num_documents: int
    """Documents with text."""
    num_bytes: int
    """UTF-8 bytes of their text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="tokenizer that `sov-tokenizer train` wrote")
    parser.add_argument("--input", required=True, action="append", metavar="[NAME=]PATH",
                        help="a text file, a .jsonl file (field text, or messages) or a folder of them; each is one source, "
                             "named after the file or folder unless NAME is given; repeat it")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the token shards")
    parser.add_argument("--heldout", type=float, default=0.02, metavar="SHARE",
                        help="part of the documents kept from training, chosen by a hash of their text (default %(default)s)")
    parser.add_argument("--format", choices=("text", "chat"), default="text",
                        help="chat: JSONL lines with messages, and which tokens are responses (default %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes that encode; the output does not depend on it (default: this machine's cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace token shards that are already there")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data pack`; returns 0."""
    pack(args.tokenizer, parse_sources(args.input), args.output, heldout_share=args.heldout, format_=args.format,
         workers=args.workers, overwrite=args.overwrite)
    return 0


def parse_sources(arguments: list[str]) -> list[Source]:
    """Read `[NAME=]PATH` arguments.

    Raises:
        UserError: a name that cannot be a folder's name, or one given twice.
    """
    sources: list[Source] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            path = argument
            name = Path(argument).resolve().stem if Path(argument).is_file() else Path(argument).resolve().name
        if not _NAME.fullmatch(name) or name == "tokenizer":
            raise UserError(f"--input {argument!r}: {name!r} cannot name a source (letters, digits, '.', '_', '-', and not "
                            f"'tokenizer'); give a name, e.g. --input web={path}")
        if name in (s.name for s in sources):
            raise UserError(f"--input {argument!r}: a source named {name!r} is given already; name them apart, "
                            f"e.g. --input {name}2={path}")
        sources.append(Source(name, Path(path)))
    return sources


def pack(tokenizer: Path, sources: list[Source], output: Path, *, heldout_share: float = 0.02, format_: str = "text",
         workers: int = 1, overwrite: bool = False) -> None:
    """Encode sources with a tokenizer and write an artifact of kind "tokens".

    Args:
        tokenizer: artifact of kind "tokenizer".
        sources: names and paths, each packed on its own.
        output: the new artifact.
        heldout_share: expected part of the documents in the split "heldout", in [0, 1).
        format_: "text" or "chat"; chats get the sidecars `.loss` and `.type`.
        workers: processes that encode.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: settings or input that break a rule; nothing is written then.
    """
    if not 0 <= heldout_share < 1:
        raise UserError(f"--heldout {heldout_share}: must lie in [0, 1), e.g. 0.02")
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    refuse_existing(output, KIND, overwrite)
    encoder = Encoder(tokenizer)
    rule = HeldoutRule(heldout_share)
    surveys = [_survey(source, format_, rule) for source in sources]
    with new_artifact(output, KIND, overwrite=overwrite) as artifact, _pool(tokenizer, workers) as pool, \
            tqdm(total=sum(s.num_bytes for s in surveys), desc="encoding", unit="B", unit_scale=True) as bar:
        records: list[dict[str, Any]] = []
        for source in sources:
            splits = _pack_source(source, artifact.path, encoder.vocab_size, format_, rule, pool, 2 * workers, bar)
            records.append({"name": source.name, "splits": splits})
        _describe(artifact, tokenizer, encoder, format_, records)
        artifact.settings = {"heldout_share": heldout_share, "inputs": sources}
    for record in records:
        name, splits = record["name"], record["splits"]
        print(f"{name}: {splits[TRAIN]['num_tokens']:,} tokens to train on, {splits[HELDOUT]['num_tokens']:,} held out")
    print(f"wrote {output}")


def _survey(source: Source, format_: str, rule: HeldoutRule) -> Survey:
    """Read a source once: count it, check its form, and tell the held-out rule its smallest and largest hash."""
    num_documents = num_bytes = 0
    smallest, largest = 1 << 64, -1
    for document in read_documents(list_files(source.path)):
        if bool(document.messages) != (format_ == "chat"):
            other = "chat" if document.messages else "text"
            raise UserError(f"{document.where}: is {'a chat' if document.messages else 'plain text'}, but --format is {format_}; "
                            f"pack it on its own with --format {other}")
        hash_ = document_hash(document)
        smallest, largest = min(smallest, hash_), max(largest, hash_)
        num_documents += 1
        num_bytes += sum(len(text.encode()) for text in document.texts())
    if not num_documents:
        raise UserError(f"{source.path}: holds no text; pass files with text in them")
    rule.learn_source(smallest, largest)
    return Survey(num_documents, num_bytes)


def _pool(tokenizer: Path, workers: int) -> ProcessPoolExecutor:
    """Start encoders in fresh processes: forking one that runs the tokenizer's threads could deadlock."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))


def _start_worker(tokenizer: Path) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process; the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed command must not leave workers that wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _encode(documents: list[Document], rule: HeldoutRule) -> dict[str, EncodedBatch]:
    return _encoder.encode_batch(documents, rule)


def batches(documents: Iterable[Document], limit_bytes: int = BATCH_BYTES) -> Iterator[tuple[list[Document], int]]:
    """Group documents, in order, until a group holds `limit_bytes`; yields groups and their bytes of text."""
    group: list[Document] = []
    size_bytes = 0
    for document in documents:
        group.append(document)
        size_bytes += sum(len(text.encode()) for text in document.texts())
        if size_bytes >= limit_bytes:
            yield group, size_bytes
            group, size_bytes = [], 0
    if group:
        yield group, size_bytes


def _pack_source(source: Source, folder: Path, vocab_size: int, format_: str, rule: HeldoutRule, pool: ProcessPoolExecutor,
                 window: int, bar: Any) -> dict[str, dict[str, Any]]:
    """Encode one source, with at most `window` batches under way; returns the manifest's record of each split."""
    num_bytes = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(
            IndexedWriter(folder / source.name / split, token_dtype(vocab_size), format_ == "chat")) for split in SPLITS}
        under_way: deque[tuple[Future[dict[str, EncodedBatch]], int]] = deque()

        def write_oldest() -> None:
            """Wait for the batch that was handed out first, and write it."""
            future, size_bytes = under_way.popleft()
            for split, batch in future.result().items():
                writers[split].write(batch.lengths_tokens, batch.columns)
                num_bytes[split] += batch.num_bytes
            bar.update(size_bytes)

        for group, size_bytes in batches(read_documents(list_files(source.path))):
            under_way.append((pool.submit(_encode, group, rule), size_bytes))
            if len(under_way) >= window:
                write_oldest()
        while under_way:
            write_oldest()
        lengths = {split: writer.lengths_tokens for split, writer in writers.items()}
    if not lengths[TRAIN]:
        raise UserError(f"{source.path}: every document was held out, none is left to train on; lower --heldout or add documents")
    return {split: {"prefix": f"{source.name}/{split}", "num_documents": len(lengths[split]), "num_tokens": sum(lengths[split]),
                    "num_bytes": num_bytes[split]} for split in SPLITS}


def _describe(artifact: ArtifactWriter, tokenizer: Path, encoder: Encoder, format_: str, records: list[dict[str, Any]]) -> None:
    """Fill the manifest and carry the tokenizer along, so that later steps need only this folder."""
    (artifact.path / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, artifact.path / "tokenizer" / name)
    artifact.add_input(tokenizer)
    artifact.content = {
        "tokenizer_sha256": read_manifest(tokenizer).content["tokenizer_sha256"],
        "vocab_size": encoder.vocab_size, "eos_id": encoder.eos_id, "dtype": token_dtype(encoder.vocab_size), "format": format_,
        "sidecars": list(SIDECARS) if format_ == "chat" else [], "sources": records,
    }
