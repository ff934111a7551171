"""Teacher outputs on disk: final hidden states, or the most probable tokens, of packed documents.

An artifact of kind "teacher_states" has one file per part, a range of documents of one source and split: one
row per token, without a header. The lengths in the token shards give the offset of each document.

A row of states is [hidden size]. With the teacher's output head, `head.safetensors`, the states give the full
distribution at a hidden size per token instead of a vocabulary. A row of the K most probable tokens is [2 K]
int32: their ids, and the bits of their float32 log-probabilities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.token_shards import Source

KIND = "teacher_states"
HEAD, HEAD_WEIGHT = "head.safetensors", "weight"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPEN_PARTS = 32
"""Limit for concurrently mapped files; a corpus has thousands."""


@dataclass(frozen=True)
class StatesPart:
    """A document range whose states are in one file."""

    source: int
    """Index among the data's sources."""
    split: str
    first_document: int
    num_documents: int
    num_tokens: int

    @property
    def file(self) -> str:
        return f"states/{self.source:04d}-{self.split}-{self.first_document:010d}.bin"


def read_lengths(source: Source, split: str) -> np.ndarray:
    """Return the document lengths in a split, [documents] int64; may be empty."""
    if not source.num_tokens.get(split):
        return np.zeros(0, np.int64)
    stored = source.open_split(split).lengths
    return np.asarray(stored[np.arange(len(stored))], np.int64)


def plan_parts(sources: list[Source], splits: tuple[str, ...], part_tokens: int) -> list[StatesPart]:
    """Return the parts for all documents, in shard order. A document belongs to the part with its first
    token, so no document is split."""
    parts = []
    for index, source in enumerate(sources):
        for split in splits:
            lengths = read_lengths(source, split)
            starts = lengths.cumsum() - lengths
            # The first document that starts in each range of `part_tokens`; a long document covers several
            # ranges.
            firsts = np.unique(starts // part_tokens, return_index=True)[1]
            counts = np.diff(firsts, append=len(lengths))
            parts += [StatesPart(index, split, int(first), int(count),
                                 int(lengths[first:first + count].sum()))
                      for first, count in zip(firsts, counts, strict=True)]
    return [part for part in parts if part.num_tokens]


@dataclass(frozen=True)
class StateFormat:
    """Outputs to keep per token."""

    dtype: str = "bfloat16"
    """Dtype of states: bfloat16 or float32."""
    top_k: int = 0
    """Number of most probable tokens to keep instead of a state; 0: states."""
    temperature: float = 1.0
    """Divisor of logits before the softmax."""
    translated: bool = False
    """Whether the tokens were translated to the student's tokenizer (`distillation.translation`)."""


def build_content(parts: list[StatesPart], hidden_size: int, vocab_size: int, kept: StateFormat,
               logits_softcap: float | None = None) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "vocab_size": vocab_size, "logits_softcap": logits_softcap,
            **asdict(kept),
            "num_tokens": sum(p.num_tokens for p in parts), "parts": [asdict(p) for p in parts]}


def pack_rows(token: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Join token ids [n, K] and log-probabilities [n, K] to rows [n, 2 K] int32."""
    return torch.cat([token.int(), logprobs.float().view(torch.int32)], dim=1)


def unpack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows from `pack_rows` into token ids [n, K] int64 and log-probabilities [n, K] float32."""
    token, bits = rows.chunk(2, dim=1)
    return token.long(), bits.contiguous().view(torch.float32)


class StateFiles:
    """Memory-mapped teacher outputs for token artifacts."""

    def __init__(self, folder: Path, sources: list[Source]) -> None:
        """Open an artifact.

        Args:
            folder: the artifact.
            sources: sources of the run, which must include those of the artifact.
        """
        self._opened_by = folder, sources
        manifest = read_manifest(folder, KIND)
        self.folder, content = folder, manifest.content
        self.hidden_size, self.vocab_size = int(content["hidden_size"]), int(content["vocab_size"])
        self.logits_softcap: float | None = content.get("logits_softcap")
        """Soft cap for the head's logits."""
        self.teacher = str(manifest.settings["teacher"])
        """Digest of the teacher's weights, configuration and adapter base."""
        self.kept = StateFormat(content["dtype"], content.get("top_k", 0), content.get("temperature", 1.0),
                         content.get("translated", False))
        self.dtype = torch.int32 if self.kept.top_k else DTYPES[self.kept.dtype]
        self.width = 2 * self.kept.top_k or self.hidden_size
        indices = self._find_sources(sources, [i for i in manifest.inputs if i["kind"] == "tokens"])
        self.sources = {index: own for own, index in enumerate(indices)}
        """Source index in the run -> source index in the artifact."""
        self._sources = [sources[index] for index in indices]
        self._parts: dict[tuple[int, str], list[StatesPart]] = {}
        for raw in content["parts"]:
            part = StatesPart(**raw)
            self._parts.setdefault((part.source, part.split), []).append(part)
        self._firsts = {of: np.array([p.first_document for p in parts]) for of, parts in self._parts.items()}
        # Caches on the object: a cache on the class would keep the files of closed objects open.
        self._open = lru_cache(maxsize=OPEN_PARTS)(self._map_part)
        self._lengths = lru_cache(maxsize=None)(self._read_lengths)

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return StateFiles, self._opened_by

    @property
    def head(self) -> Path:
        """File with the teacher's output head, a tensor [vocabulary, hidden size] named `HEAD_WEIGHT`."""
        return self.folder / HEAD

    def states(self, source: int, split: str, document: int, start: int, count: int) -> torch.Tensor:
        """Return the rows of `count` tokens of a document, [count, width], as a view. The row of a token
        predicts the next token."""
        source_index = self.sources[source]
        parts = self._parts.get((source_index, split), [])
        part_index = int(np.searchsorted(self._firsts.get((source_index, split), ()), document,
                                         side="right")) - 1
        # Parts are ordered by documents and may have gaps.
        if part_index < 0 or document >= (parts[part_index].first_document
                                             + parts[part_index].num_documents):
            raise UserError(f"{self.folder}: has no states of document {document} of source "
                            f"{self._sources[source_index].name!r} ({split}); make them again from this data")
        part = parts[part_index]
        starts, states = self._open(part)
        index = document - part.first_document
        first = int(starts[index]) + start
        if not starts[index] <= first <= first + count <= starts[index + 1]:
            raise UserError(f"{self.folder / part.file}: document {document} has "
                            f"{starts[index + 1] - starts[index]} states, not {start} to {start + count}; "
                            "make them again from this data")
        return states[first:first + count]

    def _map_part(self, part: StatesPart) -> tuple[np.ndarray, torch.Tensor]:
        file, stored = self.folder / part.file, self._lengths(part.source, part.split)
        lengths = np.asarray(stored[part.first_document + np.arange(part.num_documents)], np.int64)
        expected_bytes = part.num_tokens * self.width * self.dtype.itemsize
        size_bytes = file.stat().st_size if file.is_file() else 0
        if size_bytes != expected_bytes or lengths.sum() != part.num_tokens:
            raise UserError(f"{file}: has {size_bytes} bytes, its {part.num_tokens} tokens need "
                            f"{expected_bytes}; make the states again")
        # A private mapping: changes to the tensor never reach the disk.
        rows = torch.from_file(str(file), size=part.num_tokens * self.width, dtype=self.dtype)
        return np.concatenate([[0], lengths.cumsum()]), rows.view(-1, self.width)

    def _read_lengths(self, source: int, split: str) -> Any:
        return self._sources[source].open_split(split).lengths

    def _find_sources(self, sources: list[Source], inputs: list[dict[str, str]]) -> list[int]:
        artifacts = {manifest_sha256(s.artifact): s.artifact for s in sources if s.artifact is not None}
        for record in inputs:
            if record["manifest_sha256"] not in artifacts:
                raise UserError(f"{self.folder}: holds states of {record['path']}, not of "
                                f"{', '.join(map(str, artifacts.values()))} as it is now; make them again "
                                "from this data")
        folders = [artifacts[record["manifest_sha256"]] for record in inputs]
        return [i for folder in folders for i, s in enumerate(sources) if s.artifact == folder]
