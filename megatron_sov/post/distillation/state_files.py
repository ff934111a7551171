"""Teacher outputs for packed documents on disk: final hidden states, or the most probable tokens.

An artifact of kind "teacher_states" has a file per part, a range of documents in one source and split: a row
per token, without a header. The lengths in the token shards give the offset of every document.

A row of states is [hidden size]. With the output head of the teacher, `head.safetensors`, states give the
full distribution and take a hidden size per token instead of a vocabulary. A row of the K most probable
tokens is [2 K] int32: K ids, and the bits of K float32 log-probabilities.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.sources import Source

KIND = "teacher_states"
HEAD, HEAD_WEIGHT = "head.safetensors", "weight"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPEN_PARTS = 32
"""Limit for concurrently mapped files; a corpus has thousands of parts."""


@dataclass(frozen=True)
class StatesPart:
    """A document range with states in one `file`."""

    source: int
    """Index among the sources."""
    split: str
    first_document: int
    num_documents: int
    num_tokens: int

    @property
    def file(self) -> str:
        return f"states/{self.source:04d}-{self.split}-{self.first_document:010d}.bin"


@dataclass(frozen=True)
class StateFormat:
    """Outputs per token: a final hidden state, or the `top_k` most probable tokens."""

    dtype: str = "bfloat16"
    """Dtype of states: bfloat16 or float32."""
    top_k: int = 0
    """Number of most probable tokens; 0: states."""
    temperature: float = 1.0
    """Divisor of logits before the softmax."""


class StateFiles:
    """Memory-mapped teacher outputs for token artifacts."""

    def __init__(self, folder: Path, sources: list[Source]) -> None:
        """Open the artifact `folder`.

        Args:
            folder: an artifact of kind `KIND`.
            sources: sources of the run.

        Raises:
            UserError: the artifact has outputs for other data than `sources`.
        """
        self._arguments = folder, sources
        manifest = read_manifest(folder, KIND)
        self.folder, content = folder, manifest.content
        self.hidden_size, self.vocab_size = int(content["hidden_size"]), int(content["vocab_size"])
        self.logits_softcap: float | None = content.get("logits_softcap")
        """Soft cap for the head's logits."""
        self.teacher = str(manifest.settings["teacher"])
        """Teacher digest from `hash_weights`."""
        if content.get("translated"):
            raise UserError(f"{folder}: holds a teacher's outputs for another tokenizer, which this version "
                            "does not read; make them again with a teacher that has the student's tokenizer")
        self.state_format = StateFormat(content["dtype"], content.get("top_k", 0),
                                        content.get("temperature", 1.0))
        self.dtype = torch.int32 if self.state_format.top_k else DTYPES[self.state_format.dtype]
        self.width = 2 * self.state_format.top_k or self.hidden_size
        indices = self._find_sources(sources, [i for i in manifest.inputs if i["kind"] == "tokens"])
        self.sources = {index: stored for stored, index in enumerate(indices)}
        """Source index in the run -> source index in the artifact."""
        self._sources = [sources[index] for index in indices]
        self._parts: dict[tuple[int, str], list[StatesPart]] = {}
        for raw in content["parts"]:
            part = StatesPart(**raw)
            self._parts.setdefault((part.source, part.split), []).append(part)
        self._first_documents = {key: np.array([part.first_document for part in parts])
                                 for key, parts in self._parts.items()}
        # Caches on the object: a cache on the class would keep the files of closed objects open.
        self._open = lru_cache(maxsize=OPEN_PARTS)(self._map_part)
        self._lengths = lru_cache(maxsize=None)(
            lambda source, split: self._sources[source].open_split(split).lengths)

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return StateFiles, self._arguments

    @property
    def head(self) -> Path:
        """File with the teacher's output head: tensor `HEAD_WEIGHT`, [vocabulary, hidden size]."""
        return self.folder / HEAD

    def read_states(self, source: int, split: str, document: int, start: int, count: int) -> torch.Tensor:
        """Return the rows of `count` tokens in a document, [count, width], as a view. A token's row predicts
        the next token. Raises `UserError`: the artifact has no states for the document, or a file has another
        size."""
        key = self.sources[source], split
        part_index = int(np.searchsorted(self._first_documents.get(key, ()), document, side="right")) - 1
        part = self._parts[key][part_index] if part_index >= 0 else None
        # Parts are ordered by documents and may have gaps.
        if part is None or document >= part.first_document + part.num_documents:
            raise UserError(f"{self.folder}: has no states of document {document} of source "
                            f"{self._sources[key[0]].name!r} ({split}); make them again from this data")
        starts, states = self._open(part)
        index = document - part.first_document
        first = int(starts[index]) + start
        if not starts[index] <= first <= first + count <= starts[index + 1]:
            raise UserError(f"{self.folder / part.file}: document {document} has "
                            f"{starts[index + 1] - starts[index]} states, not {start} to {start + count}; "
                            "make them again from this data")
        return states[first:first + count]

    def _map_part(self, part: StatesPart) -> tuple[np.ndarray, torch.Tensor]:
        file, lengths_of_split = self.folder / part.file, self._lengths(part.source, part.split)
        lengths = np.asarray(lengths_of_split[part.first_document + np.arange(part.num_documents)], np.int64)
        expected_bytes = part.num_tokens * self.width * self.dtype.itemsize
        size_bytes = file.stat().st_size if file.is_file() else 0
        if size_bytes != expected_bytes or lengths.sum() != part.num_tokens:
            raise UserError(f"{file}: has {size_bytes} bytes, its {part.num_tokens} tokens need "
                            f"{expected_bytes}; make the states again")
        # A private mapping, so that changes to the tensor never reach the disk.
        rows = torch.from_file(str(file), size=part.num_tokens * self.width, dtype=self.dtype)
        return np.concatenate([[0], lengths.cumsum()]), rows.view(-1, self.width)

    def _find_sources(self, sources: list[Source], inputs: list[dict[str, str]]) -> list[int]:
        artifacts = {manifest_sha256(s.artifact): s.artifact for s in sources if s.artifact is not None}
        for record in inputs:
            if record["manifest_sha256"] not in artifacts:
                raise UserError(f"{self.folder}: holds states of {record['path']}, not of "
                                f"{', '.join(map(str, artifacts.values()))} as it is now; make them again "
                                "from this data")
        folders = [artifacts[record["manifest_sha256"]] for record in inputs]
        return [i for folder in folders for i, s in enumerate(sources) if s.artifact == folder]


def read_lengths(source: Source, split: str) -> np.ndarray:
    """Return the document lengths in a split, [documents] int64; may be empty."""
    if not source.num_tokens.get(split):
        return np.zeros(0, np.int64)
    stored = source.open_split(split).lengths
    return np.asarray(stored[np.arange(len(stored))], np.int64)


def plan_parts(sources: list[Source], splits: tuple[str, ...], part_tokens: int) -> list[StatesPart]:
    """Return the parts for all documents, in shard order. No document is split: a part contains the documents
    that start in a range of `part_tokens`."""
    parts = []
    for index, source in enumerate(sources):
        for split in splits:
            lengths = read_lengths(source, split)
            starts = lengths.cumsum() - lengths
            # First document per range of `part_tokens`; a long document covers several ranges.
            firsts = np.unique(starts // part_tokens, return_index=True)[1]
            counts = np.diff(firsts, append=len(lengths))
            parts += [StatesPart(index, split, int(first), int(count),
                                 int(lengths[first:first + count].sum()))
                      for first, count in zip(firsts, counts, strict=True)]
    return [part for part in parts if part.num_tokens]


def build_content(parts: list[StatesPart], hidden_size: int, vocab_size: int, state_format: StateFormat,
                  logits_softcap: float | None = None) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "vocab_size": vocab_size, "logits_softcap": logits_softcap,
            **asdict(state_format),
            "num_tokens": sum(p.num_tokens for p in parts), "parts": [asdict(p) for p in parts]}


def pack_rows(ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Join token ids [n, K] and log-probabilities [n, K] to rows [n, 2 K] int32."""
    return torch.cat([ids.int(), logprobs.float().view(torch.int32)], dim=1)


def unpack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows from `pack_rows` into token ids [n, K] int64 and log-probabilities [n, K] float32."""
    ids, bits = rows.chunk(2, dim=1)
    return ids.long(), bits.contiguous().view(torch.float32)
