"""Step `topics`: which of a few dozen topics a document is about, found in the documents themselves.

A sample of the documents becomes TF-IDF rows of hashed words, a truncated SVD makes them dense (latent
semantic analysis), and k-means finds the topics: what CLIMB (arXiv 2504.13161) does with an encoder's
embeddings, at a cost that a laptop bears.  Then each document goes to the nearest centre.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Le, Lt

from data_prep.curate.pipeline.step import ColumnType, Doc, Pass, Step, StepOutcome, View
from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.scorer import library_problems
from data_prep.shards.shard_damage import place_in_run, way_out
from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_json, read_sealed, sealed, write_json
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, as_problem, at_most

NUM_DIMENSIONS = 64
NUM_STARTS, BATCH_DOCUMENTS = 5, 4096
NUM_POWER_ITERATIONS = 5
"""Of the randomized SVD (Halko et al., arXiv 0909.4061)."""
NUM_WORDS = 10
MIN_CHARS = 3
"""A shorter word of letters says little."""
MAX_KNOWN_WORDS = 1_000_000
_MODEL, _TOPICS = "topics.safetensors", "topics.json"
_TIMES, _LEAST_PER_SHARD = 4, 64
"""How many times its even part of the sample a shard may give, and how many it may give in any case."""


# Topics as centres in a space of latent semantic analysis: finding them, and the nearest one.


@dataclass(frozen=True)
class TopicModel:
    """What a row of counts goes through on its way to a topic."""

    idf: np.ndarray
    """Inverse document frequency of each bucket, float32; 0 for what hardly any document has, or most."""
    directions: np.ndarray
    """[buckets, dimensions], float32."""
    centres: np.ndarray
    """[topics, dimensions], float32."""

    def embed(self, found: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
        """Return the point of a document, at distance 1 from zero; None where it has no words that count.

        Args:
            found: the buckets that it touches, and how often.
        """
        buckets, counts = found
        point = ((1.0 + np.log(counts)).astype(np.float32) * self.idf[buckets]) @ self.directions[buckets]
        length = float(np.linalg.norm(point))
        return point / length if length > 0 else None

    def nearest(self, found: tuple[np.ndarray, np.ndarray]) -> int | None:
        """Return the topic of a document, the first of equals; None where it has no words that count."""
        point = self.embed(found)
        return None if point is None else int(np.argmin(((self.centres - point) ** 2).sum(axis=1)))

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        return save({"idf": self.idf, "directions": self.directions, "centres": self.centres})

    @classmethod
    def from_bytes(cls, raw: bytes) -> TopicModel:
        from safetensors.numpy import load

        return cls(**load(raw))


def find_topics(texts: Sequence[str], ngrams: Ngrams, num_topics: int,
                seed: int) -> tuple[TopicModel, np.ndarray]:
    """Return topics, those with most texts first, and the topic of each text (-1: it has no words that
    count).  One thread does it: sums in another order would end elsewhere.

    Raises:
        UserError: fewer texts than topics have words that count.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from threadpoolctl import threadpool_limits

    counted = [ngrams.counts(text) for text in texts]
    idf = _idf(counted, ngrams.width)
    num_told_apart = sum(bool((idf[buckets] > 0).any()) for buckets, _ in counted)
    if num_told_apart < num_topics:
        raise UserError(f"topics: num_clusters = {num_topics}, and {num_told_apart} of {len(texts)} texts "
                        "have words that tell them apart; ask for fewer topics")
    matrix = _matrix(counted, idf, ngrams.width)
    with threadpool_limits(1):
        # Only buckets that count: the SVD's time grows with the columns.
        used = np.flatnonzero(idf)
        svd = TruncatedSVD(min(NUM_DIMENSIONS, len(texts) - 1, len(used)), n_iter=NUM_POWER_ITERATIONS,
                           random_state=seed)
        svd.fit(matrix[:, used])
        directions = np.zeros((ngrams.width, len(svd.components_)), np.float32)
        directions[used] = svd.components_.T
        space = TopicModel(idf, directions, np.zeros((0, 0)))
        # Points come from the model as documents do later, and not from the SVD's own output, whose last bits
        # differ.
        points = [point for found in counted if (point := space.embed(found)) is not None]
        means = MiniBatchKMeans(num_topics, random_state=seed, n_init=NUM_STARTS, batch_size=BATCH_DOCUMENTS)
        means.fit(np.stack(points))
    model = TopicModel(idf, space.directions, means.cluster_centers_.astype(np.float32))
    places = np.array([-1 if (place := model.nearest(found)) is None else place for found in counted])
    # The largest topic becomes t00; -1 stays -1, as the last entry of `renamed`.
    order = np.argsort(-np.bincount(places[places >= 0], minlength=num_topics), kind="stable")
    renamed = np.append(np.argsort(order), -1)
    return TopicModel(idf, space.directions, model.centres[order]), renamed[places]


def _idf(counted: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> np.ndarray:
    """Return ln((1 + n) / (1 + documents with the bucket)) + 1, as `TfidfTransformer` has it; 0 for what
    stands in one document only, or in more than half of them."""
    with_bucket = np.zeros(width, np.int64)
    for buckets, _ in counted:
        with_bucket[buckets] += 1
    idf = np.log((1 + len(counted)) / (1 + with_bucket)) + 1
    idf[(with_bucket < 2) | (2 * with_bucket > len(counted))] = 0
    return idf.astype(np.float32)


def _matrix(counted: Sequence[tuple[np.ndarray, np.ndarray]], idf: np.ndarray, width: int) -> Any:
    from data_prep.curate.scoring.scorer import sparse_rows

    rows = []
    for buckets, counts in counted:
        values = (1.0 + np.log(counts)).astype(np.float32) * idf[buckets]
        rows.append((buckets, values / (float(np.linalg.norm(values)) or 1.0)))
    return sparse_rows(rows, width)


# The words that tell a topic from the others, for people to read.


def top_words(texts: Sequence[str], places: np.ndarray, num_topics: int, ngrams: Ngrams) -> list[list[str]]:
    """Return the words of each topic with the highest class-based TF-IDF (BERTopic, arXiv 2203.05794,
    equation 2), each counted once for a text.

    Args:
        texts: a sample.
        places: the topic of each text; -1: none.
        num_topics: topics.
        ngrams: what cuts texts into units.
    """
    of_topic: list[Counter[str]] = [Counter() for _ in range(num_topics)]
    overall: Counter[str] = Counter()
    for text, place in zip(texts, places.tolist(), strict=True):
        if place >= 0:
            words = set(_words(ngrams.units(text)))
            of_topic[place].update(words)
            overall.update(words)
            if len(overall) > MAX_KNOWN_WORDS:
                # Memory has a bound: words that were met once so far go.
                overall = Counter({word: n for word, n in overall.items() if n > 1})
    per_topic = sum(overall.values()) / max(1, num_topics)
    found = []
    for counts in of_topic:
        weight = {word: n * float(np.log1p(per_topic / overall[word]))
                  for word, n in counts.items() if n > 1 and overall[word]}
        found.append(sorted(weight, key=lambda word: (-weight[word], word))[:NUM_WORDS])
    return found


def _words(units: Sequence[str]) -> Iterator[str]:
    for unit in units:
        if len(unit) >= MIN_CHARS and unit.isalpha():
            yield unit
    for first, second in pairwise(units):
        # Behind U+0DFF are the scripts without spaces between words.
        if len(first) == len(second) == 1 and _is_letter(first) and _is_letter(second) and first > "\u0dff":
            yield first + second


def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"


@dataclass(frozen=True)
class TopicsSettings:
    """Settings of `topics`."""

    num_clusters: Annotated[int, Ge(2), Le(10_000), at_most("sample")] = 32
    """Topics."""
    sample: AtLeastOne = 100_000
    """Documents that topics are found in."""
    seed: Annotated[int, Ge(0), Lt(1 << 32)] = 0
    """Another seed takes another sample, and begins elsewhere."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 4_000
    """Characters of a document that are read, from its beginning."""

    def problems(self) -> list[SettingsProblem]:
        return list(map(as_problem, library_problems()))


class Topics(Step):
    """A column of topics: t00 is the one with most documents of the sample."""

    kind: ClassVar[str] = "topics"
    adds: ClassVar[Mapping[str, ColumnType]] = {"topic": "string"}
    Settings = TopicsSettings

    def __init__(self, settings: TopicsSettings) -> None:
        super().__init__(settings)
        self._ngrams = Ngrams(NgramSettings(num_buckets=1 << 16, max_chars=settings.max_chars))
        self._model: TopicModel | None = None

    def passes(self) -> Sequence[Pass]:
        return (Pass("sample", self.take_sample), Pass("fit", self.fit, 1))

    def take_sample(self, view: View, task: int) -> None:
        """Write the documents of a shard whose places have the smallest hashes."""
        # More than the even part, since shards differ in size and the smallest hashes of all shards are the
        # sample.
        wanted = min(self.settings.sample, max(_LEAST_PER_SHARD,
                                               _TIMES * self.settings.sample // max(1, len(view.shards))))
        taken: list[tuple[str, str]] = []
        for documents in view.documents(view.shards[task]):
            taken += [(self._hash(document), document.text[: self.settings.max_chars])
                      for document in documents]
            # Cut from time to time, and not for each batch: sorting is what costs.
            if len(taken) > 2 * wanted:
                taken = sorted(taken)[:wanted]
        folder = view.work / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{task:06d}.json"
        write_json(file, sorted(taken)[:wanted], place_in_run(file))

    def fit(self, view: View, task: int) -> None:
        """Find topics in the samples of all shards.

        Raises:
            UserError: there are fewer documents than topics.
        """
        taken: list[tuple[str, str]] = []
        for file in sorted((view.work / "sample").glob("*.json")):
            taken += [(key, text) for key, text in read_json(file, way_out(file), place_in_run(file))]
            # After each file: memory holds one sample and one shard's part.
            taken = sorted(taken)[: self.settings.sample]
        texts = [text for _, text in taken]
        if len(texts) < self.settings.num_clusters:
            raise UserError(f"topics: num_clusters = {self.settings.num_clusters} and there are "
                            f"{len(texts)} documents; ask for fewer topics")
        model, places = find_topics(texts, self._ngrams, self.settings.num_clusters, self.settings.seed)
        words = top_words(texts, places, self.settings.num_clusters, self._ngrams)
        sizes = np.bincount(places[places >= 0], minlength=self.settings.num_clusters).tolist()
        topics = [{"topic": _name(i), "num_sampled": size, "words": words[i]} for i, size in enumerate(sizes)]
        atomic_write(view.work / _MODEL, sealed(model.to_bytes(), place_in_run(view.work / _MODEL)))
        atomic_write(view.work / _TOPICS, to_json({"num_sampled": len(texts), "topics": topics}))

    def start(self, view: View) -> None:
        file = view.work / _MODEL
        self._model = TopicModel.from_bytes(read_sealed(file, way_out(file), place_in_run(file)))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        assert self._model is not None, "outcomes before start"
        found = []
        for document in documents:
            place = self._model.nearest(self._ngrams.counts(document.text))
            found.append(StepOutcome(values={"topic": None if place is None else _name(place)}))
        return found

    def _hash(self, document: Doc) -> str:
        return blake2b(f"{self.settings.seed} {document.lot}".encode(), digest_size=16).hexdigest()


def _name(place: int) -> str:
    return f"t{place:02d}"
