"""Sources seen in another way: parts by the length of their documents (NAME@N and NAME/N in a blend), chats
as text, and the blends that the data bring along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.model.config import PhaseConfig, RunConfig
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.modality import EncoderInputs, get_banks, get_encoder_inputs
from megatron_sov.train.data.token_shards import ChainedLengths, Documents, Source, name_sources


class LongDocuments:
    """The documents of `documents` with at least `min_tokens` tokens; the index is made on first use."""

    def __init__(self, documents: Documents, min_tokens: int) -> None:
        self._documents, self._min_tokens = documents, min_tokens
        self.is_plain = documents.is_plain
        self.columns = documents.columns
        self.banks = get_banks(documents)

    @cached_property
    def index(self) -> np.ndarray:
        """[long documents] int64: their numbers in the source, ascending."""
        lengths = self._documents.lengths
        parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
        starts = np.cumsum([0, *(len(p) for p in parts)])
        return np.concatenate([np.flatnonzero(p >= self._min_tokens) + s
                               for p, s in zip(parts, starts[:-1], strict=True)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[long documents] int64: their tokens."""
        return np.asarray(self._documents.lengths[self.index], np.int64)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.tokens(int(self.index[document]), start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.loss_weights(int(self.index[document]), start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.types(int(self.index[document]), start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.column(name, int(self.index[document]), start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.routes(int(self.index[document]), start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        return get_encoder_inputs(self._documents, int(self.index[document]), start, count)


# Chats as text: of their tokens the weights say what is learned, and not who wrote them.

TEXT_FORMAT = "text"


class TextView:
    """Documents whose tokens are all of the type of text."""

    is_plain = False

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.lengths, self.columns = documents.lengths, documents.columns
        self.banks = get_banks(documents)

    def __reduce__(self) -> tuple[Any, ...]:  # its lengths are maps of files
        return TextView, (self._documents,)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.tokens(document, start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.loss_weights(document, start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.full(count, TYPE_TEXT, np.uint8)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.column(name, document, start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.routes(document, start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        return get_encoder_inputs(self._documents, document, start, count)


def view_as_text(source: Source) -> Source:
    """Return a source as one of text: it is cut where a row ends, and its held-out documents, which would be
    judged as responses, are left aside."""
    if source.format == TEXT_FORMAT:
        return source
    return dataclasses.replace(source, format=TEXT_FORMAT,
                               train_documents=TextView(source.open_split("train")),
                               num_tokens={"train": source.num_tokens["train"], "heldout": 0})


LONG_MARK, PIECES_MARK = "@", "/"


# The documents of a source cut into short pieces: what a phase at that length would read, for rehearsal at
# a longer one.


class PieceLengths:
    """The tokens of each piece, worked out when asked: 8 bytes are kept for a document, none for a piece."""

    def __init__(self, document_tokens: np.ndarray, max_tokens: int) -> None:
        self._tokens, self._max_tokens = document_tokens, max_tokens
        self._ends = np.cumsum(-(-document_tokens // max_tokens))

    def find(self, piece: int) -> tuple[int, int]:
        """Return the document that holds a piece, and the piece's first token there."""
        document = int(np.searchsorted(self._ends, piece, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        return document, (piece - before) * self._max_tokens

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, pieces: Any) -> Any:
        documents = np.searchsorted(self._ends, pieces, side="right")
        # pieces of the same document behind this one
        left_behind = self._ends[documents] - 1 - np.asarray(pieces)
        number = -(-self._tokens[documents] // self._max_tokens) - 1 - left_behind
        found = np.minimum(self._max_tokens, self._tokens[documents] - number * self._max_tokens)
        return int(found) if np.ndim(pieces) == 0 else found

    def __iter__(self) -> Iterator[int]:
        return (self[piece] for piece in range(len(self)))


class DocumentPieces:
    """The documents of `documents` in pieces of at most `max_tokens` tokens; a piece knows nothing
    of the one before."""

    def __init__(self, documents: Documents, max_tokens: int) -> None:
        self._documents, self._max_tokens = documents, max_tokens
        self.is_plain = documents.is_plain
        self.columns = documents.columns
        self.banks = get_banks(documents)

    @cached_property
    def lengths(self) -> PieceLengths:
        lengths = self._documents.lengths
        return PieceLengths(np.asarray(lengths[np.arange(len(lengths))], np.int64), self._max_tokens)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids of a piece, int64."""
        whole, first = self.lengths.find(document)
        return self._documents.tokens(whole, first + start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        whole, first = self.lengths.find(document)
        return self._documents.loss_weights(whole, first + start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        whole, first = self.lengths.find(document)
        return self._documents.types(whole, first + start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        whole, first = self.lengths.find(document)
        return self._documents.column(name, whole, first + start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        whole, first = self.lengths.find(document)
        return self._documents.routes(whole, first + start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        whole, first = self.lengths.find(document)
        return get_encoder_inputs(self._documents, whole, first + start, count)


def add_source_views(config: RunConfig, sources: list[Source]) -> list[Source]:
    """Return the sources and what the blends make of them: NAME@N, the documents of NAME with at least N
    tokens; NAME/N, all its documents in pieces of at most N.

    Each is a stream of its own: a long document is read by NAME in its turn as well.

    Raises:
        UserError: N is not a number, NAME has no document that long, or its conversations would be cut.
    """
    known = {s.name: s for s in sources}
    wanted = dict.fromkeys(name for phase in config.data.phases for name in phase.blend if name not in known)
    views = (_view(name, known) for name in wanted)
    return sources + [view for view in views if view is not None]


def _view(name: str, known: dict[str, Source]) -> Source | None:
    """Return the view that a name means; None where it means none, and the plan names the unknown source."""
    kind = next((mark for mark in (LONG_MARK, PIECES_MARK) if name.rpartition(mark)[0] in known), None)
    if kind is None:
        return None
    base, _, number = name.rpartition(kind)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data.phases blend {name!r}: after the {kind} stands a number of tokens, e.g. "
                        f"{base}{kind}8192")
    source, tokens = known[base], int(number)
    if kind == PIECES_MARK:
        if source.is_chat:
            raise UserError(f"data.phases blend {name!r}: conversations of {base} stay whole; "
                            f"name {base} alone")
        return dataclasses.replace(source, name=name, share=0.0,
                                   train_documents=DocumentPieces(source.open_split("train"), tokens),
                                   num_tokens={"train": source.num_tokens["train"], "heldout": 0})
    if source.group > 1:
        raise UserError(f"data.phases blend {name!r}: documents of {base} belong together by "
                        f"{source.group}; name {base} alone, and see data.over_long")
    documents = LongDocuments(source.open_split("train"), tokens)
    if not len(documents.index):
        raise UserError(f"data.phases blend {name!r}: source {base} has no document of {tokens} "
                        "tokens or more")
    return dataclasses.replace(source, name=name, share=0.0, train_documents=documents,
                               num_tokens={"train": int(documents.lengths.sum()), "heldout": 0})


# Phases that the data brings along: what `sov-data mix --blend` has shared out by the tags of its
# sources.

def apply_data_phases(config: RunConfig, recipe: RunConfig) -> RunConfig:
    """Return the settings with the blends of the data's own phases.

    A phase takes the blend of the data's phase of its name where its own is empty, or is the recipe's and
    names a source that the data does not have: those names are the recipe's author's.  Tokens, lengths and
    batches stay its own.  Data of several folders has no phases.

    Args:
        config: settings as they are asked for.
        recipe: the same without --set, which nothing here goes before.

    Raises:
        UserError: the data's phases cannot be read.
    """
    if len(config.data.paths) != 1:
        return config
    [path] = config.data.paths
    try:
        content = read_manifest(split_source_name(path)[1], "tokens").content
    except UserError:
        return config  # told where the data is opened, with everything else that is wrong with it
    names = name_sources(path, content)
    mixed = {phase: {names.get(name, name): share for name, share in blend.items()}
             for phase, blend in _mixed_phases_of(path, content).items()}
    known = {*names.values()}
    of_recipe = {phase.name: phase.blend for phase in recipe.data.phases}

    def is_open(phase: PhaseConfig) -> bool:
        if not phase.blend:
            return True
        return phase.blend == of_recipe.get(phase.name) and not _source_names(phase) <= known

    phases = tuple(dataclasses.replace(phase, blend=mixed[phase.name])
                   if phase.name in mixed and is_open(phase) else phase for phase in config.data.phases)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))


def _mixed_phases_of(path: str, content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return phase -> source -> share."""
    try:
        return {str(phase["name"]): {str(name): float(share) for name, share in phase["blend"].items()}
                for phase in content.get("phases", [])}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: its phases cannot be read ({e!r}); mix the data again") from None


def _source_names(phase: PhaseConfig) -> set[str]:
    """Return the sources that a blend names, without the lengths of their documents."""
    names = set()
    for name in phase.blend:
        mark = next((mark for mark in (LONG_MARK, PIECES_MARK) if mark in name), None)
        names.add(name if mark is None else name.rpartition(mark)[0])
    return names
