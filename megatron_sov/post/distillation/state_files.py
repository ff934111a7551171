"""What a teacher says of documents that it has read, on disk beside them: its final hidden states, or its
most probable tokens.

An artifact of kind "teacher_states" holds one file per part, a run of documents of one source and split:
rows of one width, one for each token of these documents one after the other, and nothing else.  Where a
document begins follows from the lengths in the token shards, so that a row is found by source, split,
document and offset.

A row of states is [hidden size]; `head.safetensors` has the teacher's output head: with it the states are the
whole distribution, at the bytes of a hidden size per token instead of a vocabulary's.  A row of the K most
probable tokens is [2 K] int32: their ids, and the bits of their log-probabilities in float32.
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
"""Files of parts that are mapped at a time: those of a corpus would be thousands of mappings."""


@dataclass(frozen=True)
class StatesPart:
    """A run of documents whose states lie in one file."""

    source: int
    """Index among the sources of the data."""
    split: str
    first_document: int
    num_documents: int
    num_tokens: int

    @property
    def file(self) -> str:
        return f"states/{self.source:04d}-{self.split}-{self.first_document:010d}.bin"


def lengths_of(source: Source, split: str) -> np.ndarray:
    """Return the tokens [documents] int64 of each document of a split, which may have none."""
    if not source.num_tokens.get(split):
        return np.zeros(0, np.int64)
    stored = source.shard(split).lengths
    return np.asarray(stored[np.arange(len(stored))], np.int64)


def parts_of(sources: list[Source], splits: tuple[str, ...], part_tokens: int) -> list[StatesPart]:
    """Return the parts of all documents, in the order of the shards.

    A document belongs to the part in which its first token lies, so that no document is cut.
    """
    found = []
    for index, source in enumerate(sources):
        for split in splits:
            lengths = lengths_of(source, split)
            starts = lengths.cumsum() - lengths
            # The first document that begins in each stretch; a stretch inside of a long document has none.
            firsts = np.unique(starts // part_tokens, return_index=True)[1]
            counts = np.diff(firsts, append=len(lengths))
            found += [StatesPart(index, split, int(first), int(count),
                                 int(lengths[first:first + count].sum()))
                      for first, count in zip(firsts, counts, strict=True)]
    return [part for part in found if part.num_tokens]


@dataclass(frozen=True)
class Kept:
    """What is kept of each token."""

    dtype: str = "bfloat16"
    """Of states: bfloat16 or float32."""
    top_k: int = 0
    """Most probable tokens that are kept in the place of a state; 0: none."""
    temperature: float = 1.0
    """What the logits were divided by, of whose softmax the most probable tokens' log-probabilities are."""
    translated: bool = False
    """Whether they are the student's tokens, and the teacher's others (`distillation.translation`)."""


def content_of(parts: list[StatesPart], hidden_size: int, vocab_size: int, kept: Kept,
               logits_softcap: float | None = None) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "vocab_size": vocab_size, "logits_softcap": logits_softcap,
            **asdict(kept),
            "num_tokens": sum(p.num_tokens for p in parts), "parts": [asdict(p) for p in parts]}


def packed(token: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Return rows [n, 2 K] int32 of the most probable tokens [n, K] and their log-probabilities [n, K]."""
    return torch.cat([token.int(), logprobs.float().view(torch.int32)], dim=1)


def unpacked(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [n, K] int64 and log-probabilities [n, K] float32 of what `packed` gave."""
    token, bits = rows.chunk(2, dim=1)
    return token.long(), bits.contiguous().view(torch.float32)


class StateFiles:
    """The states of a teacher over token artifacts, by memory map."""

    def __init__(self, folder: Path, sources: list[Source]) -> None:
        """Open an artifact.

        Args:
            folder: the artifact.
            sources: those that a run reads; those of the data that it was made from are among them.

        Raises:
            UserError: it was made from other data, or is damaged.
        """
        self._opened_by = folder, sources
        manifest = read_manifest(folder, KIND)
        self.folder, content = folder, manifest.content
        self.hidden_size, self.vocab_size = int(content["hidden_size"]), int(content["vocab_size"])
        self.logits_softcap: float | None = content.get("logits_softcap")
        """Cap on the logits that the head makes of states."""
        self.teacher = str(manifest.settings["teacher"])
        """Digest of the teacher: of its weights, its configuration, and the base of an adapter."""
        self.kept = Kept(content["dtype"], content.get("top_k", 0), content.get("temperature", 1.0),
                         content.get("translated", False))
        self.dtype = torch.int32 if self.kept.top_k else DTYPES[self.kept.dtype]
        """Of the numbers in a row."""
        self.width = 2 * self.kept.top_k or self.hidden_size
        """Numbers of a row."""
        found = self._find_sources(sources, [i for i in manifest.inputs if i["kind"] == "tokens"])
        self.sources = {index: own for own, index in enumerate(found)}
        """Index of each source that it was made from, among those of the run -> its index in here."""
        self._sources = [sources[index] for index in found]
        self._parts: dict[tuple[int, str], list[StatesPart]] = {}
        for raw in content["parts"]:
            part = StatesPart(**raw)
            self._parts.setdefault((part.source, part.split), []).append(part)
        self._firsts = {of: np.array([p.first_document for p in parts]) for of, parts in self._parts.items()}
        # Of this object, and not of the class: an entry would keep its files open.
        self._open = lru_cache(maxsize=OPEN_PARTS)(self._map_part)
        self._lengths = lru_cache(maxsize=None)(self._lengths_of)

    def __reduce__(self) -> tuple[Any, ...]:  # in another process its files are mapped again
        return StateFiles, self._opened_by

    @property
    def head(self) -> Path:
        """File of the teacher's output head, a tensor [vocabulary, hidden size] named `HEAD_WEIGHT`."""
        return self.folder / HEAD

    def states(self, source: int, split: str, document: int, start: int, count: int) -> torch.Tensor:
        """Return the rows [count, width] of some tokens of a document, not copied.

        The row of a token is what predicts the token behind it.

        Raises:
            UserError: these tokens have no states.
        """
        own = self.sources[source]
        parts = self._parts.get((own, split), [])
        place = int(np.searchsorted(self._firsts.get((own, split), ()), document, side="right")) - 1
        # Parts are in the order of documents, and may have gaps.
        if place < 0 or document >= parts[place].first_document + parts[place].num_documents:
            raise UserError(f"{self.folder}: has no states of document {document} of source "
                            f"{self._sources[own].name!r} ({split}); make them again from this data")
        part = parts[place]
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
        wanted = part.num_tokens * self.width * self.dtype.itemsize
        size_bytes = file.stat().st_size if file.is_file() else 0
        if size_bytes != wanted or lengths.sum() != part.num_tokens:
            raise UserError(f"{file}: has {size_bytes} bytes, its {part.num_tokens} tokens ask for "
                            f"{wanted}; make the states again")
        # torch maps a file privately: nothing that is done to a tensor reaches the disk
        rows = torch.from_file(str(file), size=part.num_tokens * self.width, dtype=self.dtype)
        return np.concatenate([[0], lengths.cumsum()]), rows.view(-1, self.width)

    def _lengths_of(self, source: int, split: str) -> Any:
        return self._sources[source].shard(split).lengths

    def _find_sources(self, sources: list[Source], made_from: list[dict[str, str]]) -> list[int]:
        artifacts = {manifest_sha256(s.artifact): s.artifact for s in sources if s.artifact is not None}
        for made in made_from:
            if made["manifest_sha256"] not in artifacts:
                raise UserError(f"{self.folder}: holds states of {made['path']}, not of "
                                f"{', '.join(map(str, artifacts.values()))} as it is now; make them again "
                                "from this data")
        folders = [artifacts[made["manifest_sha256"]] for made in made_from]
        return [i for folder in folders for i, s in enumerate(sources) if s.artifact == folder]
