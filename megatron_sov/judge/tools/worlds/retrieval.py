"""Retrieval environment: search and read documents from a file."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.scripts import get_script
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    UNIQUE_ITEMS, AtLeastOne, Bound, NotNegativeInt, ProblemCode, Violation, differs_from_field)
from megatron_sov.judge.tools.environment import Parameter, Tool, ToolRefused
from megatron_sov.judge.tools.worlds.goals import AnsweredWorld

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")
_NO_SPACES = {"THAI", "LAO", "KHMER", "MYANMAR", "CJK", "HIRAGANA", "KATAKANA"}
MAX_DOCUMENTS = 500_000
"""Most documents, because each process holds the index in memory."""
MAX_QUERIES = 16
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")


# BM25 ranking (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009,
# equation 3.15), with 1 added inside the logarithm for a non-negative inverse document frequency, as in
# Lucene.


def split_terms(text: str) -> list[str]:
    """Return lower-case words; for scripts without spaces, pairs of adjacent characters."""
    terms: list[str] = []
    for word in _WORD.findall(text.casefold()):
        if len(word) > 1 and get_script(word[0]) in _NO_SPACES:
            terms += [word[i:i + 2] for i in range(len(word) - 1)]
        else:
            terms.append(word)
    return terms


class Bm25:
    """In-memory BM25 index."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._lengths: list[int] = []
        # term -> (document, count): a search only touches documents with its terms
        self._counts: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, document in enumerate(documents):
            counts = Counter(split_terms(document))
            self._lengths.append(sum(counts.values()))
            for term, count in counts.items():
                self._counts[term].append((number, count))
        self._mean_length = sum(self._lengths) / max(len(self._lengths), 1) or 1.0

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """Return the best (document, score), best first, ties by index; documents without any term are
        omitted."""
        scores: defaultdict[int, float] = defaultdict(float)
        for term, times in Counter(split_terms(query)).items():
            places = self._counts.get(term, [])
            # ln(1 + (N - n + 0.5) / (n + 0.5)) for n out of N documents with the term
            idf = math.log(1 + (len(self._lengths) - len(places) + 0.5) / (len(places) + 0.5))
            for number, tf in places:
                # B: penalty for long documents; K1: saturation for repeated terms.
                length = K1 * (1 - B + B * self._lengths[number] / self._mean_length)
                scores[number] += times * idf * tf * (K1 + 1) / (tf + length)
        return sorted(scores.items(), key=lambda found: (-found[1], found[0]))[:count]


def _find_name_problem(text: str) -> Violation | None:
    return None if _NAME.fullmatch(text) else (ProblemCode.BOUND, "must be a name of letters, digits and _",
                                               "")


def _find_file_problem(path: str) -> Violation | None:
    return None if Path(path).is_file() else (
        ProblemCode.FILE, "is no file", "name one in JSON lines, a document each")


ToolName = Annotated[str, Bound(_find_name_problem)]


@dataclass
class Retrieval(AnsweredWorld):
    """Search and read tools over documents; tool and argument names are settings, to match a model's other
    uses."""

    corpus: Annotated[str, Bound(_find_file_problem)]
    """JSON Lines file with a document per line."""
    text: str = "text"
    """Document field with the text."""
    keys: Annotated[tuple[ToolName, ...], MinLen(1), UNIQUE_ITEMS] = ("id",)
    """Fields for reading documents: the first is required, the others narrow the selection."""
    search: ToolName = "search"
    """Name of the search tool."""
    read: Annotated[ToolName, differs_from_field("search")] = "read"
    """Name of the read tool."""
    query: ToolName = "query"
    """Argument name in the search tool."""
    queries: Literal["one", "list"] = "one"
    """The argument is a text, or a list of texts."""
    top_k: AtLeastOne = 3
    """Documents per query."""
    snippet_chars: NotNegativeInt = 200
    """Characters per found document."""
    system: str = ("Answer from the documents: search them, read what looks right. End with "
                   '"The answer is" and the answer.')
    """Rules for tasks without their own."""

    def rules(self) -> str:
        return self.system

    def inputs(self) -> dict[str, str]:
        """Return version inputs: the digest of the corpus."""
        return {"corpus": hash_file(Path(self.corpus))}

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        """Both tools by their configured names."""
        query = Parameter(list[str] if self.queries == "list" else str,
                          "queries, each of which is searched for" if self.queries == "list"
                          else "words to search for")
        read = {key: Parameter(str, f"{key} of the document") if i == 0 else
                Parameter(str | None, f"{key}, where only that part is wanted", None)
                for i, key in enumerate(self.keys)}
        return {self.search: Tool(self.search, f"Search the documents; gives the {self.top_k} best of each "
                                               "query, with the beginning of their text.",
                                  {self.query: query}, self._run_search),
                self.read: Tool(self.read, f"Read documents by {', '.join(self.keys)}.", read,
                                self._run_read)}

    @cached_property
    def _loaded_documents(self) -> list[dict[str, Any]]:
        documents = []
        for place, document in read_records(Path(self.corpus)):
            where = f"corpus {place}"
            if not isinstance(document.get(self.text), str):
                raise UserError(f"{where}: its {self.text!r} must be text; name the field with text=...")
            if missing := [key for key in self.keys if not isinstance(document.get(key, ""), (str, int))]:
                raise UserError(f"{where}: its {missing[0]!r} must be text or a whole number")
            if self.keys[0] not in document:
                raise UserError(f"{where}: has no {self.keys[0]!r}; name the fields with keys=[...]")
            documents.append(document)
            if len(documents) > MAX_DOCUMENTS:
                raise UserError(f"corpus {self.corpus}: has more than {MAX_DOCUMENTS:,} documents, which lie "
                                "in the memory of each process; take a search server of your own")
        if not documents:
            raise UserError(f"corpus {self.corpus}: has no documents")
        return documents

    @cached_property
    def _search_index(self) -> Bm25:
        return Bm25([" ".join([*(str(d.get(key, "")) for key in self.keys), d[self.text]])
                     for d in self._loaded_documents])

    @cached_property
    def _by_key(self) -> dict[str, list[dict[str, Any]]]:
        documents: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for document in self._loaded_documents:
            documents[str(document[self.keys[0]])].append(document)
        return dict(documents)

    def first_state(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Return {}; load the documents before calls are timed."""
        assert self._search_index and self._by_key
        return {}

    def _run_search(self, **arguments: Any) -> list[Any]:
        queries = arguments[self.query]
        if self.queries == "one":
            return self._find_documents(queries)
        if len(queries) > MAX_QUERIES:
            raise ToolRefused(f"{self.query} has {len(queries)} queries, at most {MAX_QUERIES}")
        return [{"query": query, "results": self._find_documents(query)} for query in queries]

    def _find_documents(self, query: str) -> list[dict[str, Any]]:
        return [self._format_document(self._loaded_documents[number], self.snippet_chars)
                for number, _ in self._search_index.search(query, self.top_k)]

    def _format_document(self, document: dict[str, Any], most_chars: int | None = None) -> dict[str, Any]:
        return {**{key: document.get(key) for key in self.keys}, self.text: document[self.text][:most_chars]}

    def _run_read(self, **wanted: str | None) -> list[dict[str, Any]]:
        keys = {key: value for key, value in wanted.items() if value is not None}
        documents = [d for d in self._by_key.get(keys[self.keys[0]], [])
                     if all(str(d.get(key, "")) == value for key, value in keys.items())]
        if not documents:
            raise ToolRefused(f"there is no document with {keys}; search for it first")
        return [self._format_document(document) for document in documents]
