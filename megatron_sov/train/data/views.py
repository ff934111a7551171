"""Views of sources: documents with a minimum length (NAME@N in a blend), pieces of documents (NAME/N), and
chats as text; also blends from the phases in a token artifact."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.shard_files import check_token_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.model.config import PhaseConfig, RunConfig
from megatron_sov.model.config.data import split_source_name
from megatron_sov.train.data.sources import Source, name_sources
from megatron_sov.train.data.token_shards import ChainedLengths, Documents, DocumentView

LONG_MARK, PIECES_MARK = "@", "/"
TEXT_FORMAT = "text"


def add_source_views(config: RunConfig, sources: list[Source]) -> list[Source]:
    """Return the sources, followed by the views that the blends name.

    NAME@N has the documents of NAME with at least N tokens, NAME/N has pieces of at most N tokens of every
    document. A view is an additional stream: NAME still reads the documents, too. Raises `UserError` if N is
    not a number, NAME has no document with N tokens, or conversations would be cut."""
    sources_by_name = {source.name: source for source in sources}
    new_names = dict.fromkeys(name for phase in config.data.phases for name in phase.blend
                              if name not in sources_by_name)
    views = (_build_view(name, sources_by_name) for name in new_names)
    return sources + [view for view in views if view is not None]


def _build_view(name: str, sources_by_name: dict[str, Source]) -> Source | None:
    """Build the view `name`, or return None for other names, which `plan_ledger` reports as unknown."""
    for mark in (LONG_MARK, PIECES_MARK):
        base, _, number = name.rpartition(mark)
        if base in sources_by_name:
            break
    else:
        return None
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data.phases blend {name!r}: must have a token count after {mark}, e.g. "
                        f"{base}{mark}8192")
    source, tokens = sources_by_name[base], int(number)
    if mark == PIECES_MARK:
        if source.is_chat:
            raise UserError(f"data.phases blend {name!r}: {base} holds conversations, which are not "
                            f"split; write {base} without {mark}{number}")
        return _replace_documents(source, DocumentPieces(source.open_split("train"), tokens),
                                  source.num_tokens["train"], name=name, share=0.0)
    if source.group > 1:
        raise UserError(f"data.phases blend {name!r}: {base} has groups with {source.group} "
                        f"documents, which stay together; write {base} without {mark}{number}, and see "
                        "data.over_long")
    documents = LongDocuments(source.open_split("train"), tokens)
    if not len(documents.index):
        raise UserError(f"data.phases blend {name!r}: source {base} has no document with "
                        f"{tokens} or more tokens; choose a smaller number")
    return _replace_documents(source, documents, int(documents.lengths.sum()), name=name, share=0.0)


def view_as_text(source: Source) -> Source:
    """Return a text source with the tokens from `source`, so that rows may cut conversations.

    The view has no held-out documents, because they would be evaluated as responses."""
    if source.format == TEXT_FORMAT:
        return source
    return _replace_documents(source, TextView(source.open_split("train")), source.num_tokens["train"],
                              format=TEXT_FORMAT)


def _replace_documents(source: Source, documents: Documents, num_tokens: int, **fields: Any) -> Source:
    return dataclasses.replace(source, train_documents=documents,
                               num_tokens={"train": num_tokens, "heldout": 0}, **fields)


class LongDocuments(DocumentView):
    """Documents with at least `min_tokens` tokens; the index is computed on first use."""

    def __init__(self, documents: Documents, min_tokens: int) -> None:
        super().__init__(documents, documents.is_plain)
        self._min_tokens = min_tokens

    @cached_property
    def index(self) -> np.ndarray:
        """[long documents] int64: document numbers in the source, ascending."""
        lengths = self._documents.lengths
        parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return np.concatenate([np.flatnonzero(part >= self._min_tokens) + start
                               for part, start in zip(parts, starts[:-1], strict=True)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[long documents] int64: tokens per document."""
        return np.asarray(self._documents.lengths[self.index], np.int64)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, int(self.index[document]), 0


class TextView(DocumentView):
    """Documents with every token of type text; loss weights still mark the tokens to learn."""

    def __init__(self, documents: Documents) -> None:
        super().__init__(documents, is_plain=False)
        self.lengths = documents.lengths

    def __reduce__(self) -> tuple[Any, ...]:  # its lengths are memory maps
        return TextView, (self._documents,)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, document, 0

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.full(count, TYPE_TEXT, np.uint8)


class DocumentPieces(DocumentView):
    """Documents in pieces of at most `max_tokens` tokens, without context from the previous piece."""

    def __init__(self, documents: Documents, max_tokens: int) -> None:
        super().__init__(documents, documents.is_plain)
        self._max_tokens = max_tokens

    @cached_property
    def lengths(self) -> "PieceLengths":
        lengths = self._documents.lengths
        return PieceLengths(np.asarray(lengths[np.arange(len(lengths))], np.int64), self._max_tokens)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, *self.lengths.locate_piece(document)


class PieceLengths:
    """Tokens per piece, computed on access from 8 stored bytes per document."""

    def __init__(self, document_tokens: np.ndarray, max_tokens: int) -> None:
        self._tokens, self._max_tokens = document_tokens, max_tokens
        self._ends = np.cumsum(-(-document_tokens // max_tokens))

    def locate_piece(self, piece: int) -> tuple[int, int]:
        """Return the document that contains a piece, and the piece's first token."""
        document = int(np.searchsorted(self._ends, piece, side="right"))
        first_piece = int(self._ends[document - 1]) if document else 0
        return document, (piece - first_piece) * self._max_tokens

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, pieces: Any) -> Any:
        documents = np.searchsorted(self._ends, pieces, side="right")
        num_later = self._ends[documents] - 1 - np.asarray(pieces)
        number = -(-self._tokens[documents] // self._max_tokens) - 1 - num_later
        tokens = np.minimum(self._max_tokens, self._tokens[documents] - number * self._max_tokens)
        return int(tokens) if np.ndim(pieces) == 0 else tokens

    def __iter__(self) -> Iterator[int]:
        return (self[piece] for piece in range(len(self)))


def apply_data_phases(config: RunConfig, recipe: RunConfig) -> RunConfig:
    """Return the settings with blends from the phases in the data's manifest (`sov-data mix --blend`).

    A phase takes the blend of the manifest's phase with its name if its own blend is empty, or if its blend
    comes from `recipe` (the settings without `--set`) and names a source missing from the data. Several data
    folders have no phases. Raises `UserError` if the phases in the manifest cannot be read."""
    if len(config.data.paths) != 1:
        return config
    [path] = config.data.paths
    try:
        content = read_manifest(split_source_name(path)[1], "tokens").content
        check_token_manifest(path, content)
    except UserError:
        return config  # `open_sources` reports the error, with other problems of the data
    names = name_sources(path, content)
    blends = {phase: {names.get(name, name): share for name, share in blend.items()}
              for phase, blend in _read_blends(path, content).items()}
    source_names = {*names.values()}
    recipe_blends = {phase.name: phase.blend for phase in recipe.data.phases}

    def takes_data_blend(phase: PhaseConfig) -> bool:
        if phase.name not in blends:
            return False
        if not phase.blend:
            return True
        is_recipe_blend = phase.blend == recipe_blends.get(phase.name)
        return is_recipe_blend and not _list_source_names(phase) <= source_names

    phases = tuple(dataclasses.replace(phase, blend=blends[phase.name]) if takes_data_blend(phase) else phase
                   for phase in config.data.phases)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))


def _read_blends(path: str, content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return phase -> source -> share from a manifest's content."""
    blends: dict[str, dict[str, float]] = {}
    try:
        for phase in content.get("phases", []):
            blends[str(phase["name"])] = {str(name): float(share) for name, share in phase["blend"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: its phases cannot be read ({e!r}); mix the data again") from None
    return blends


def _list_source_names(phase: PhaseConfig) -> set[str]:
    """Return the sources that a blend names, without view marks."""
    names = set()
    for name in phase.blend:
        mark = next((mark for mark in (LONG_MARK, PIECES_MARK) if mark in name), None)
        names.add(name if mark is None else name.rpartition(mark)[0])
    return names
