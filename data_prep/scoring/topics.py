"""Step `topics`: which of a few dozen topics a document is about, found in the documents themselves.

A sample of the documents becomes TF-IDF rows of hashed words, a truncated SVD makes them dense (latent
semantic analysis), and k-means finds the topics: what CLIMB (arXiv 2504.13161) does with an encoder's
embeddings, at a cost that a laptop bears.  Then each document goes to the nearest centre.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Le, Lt

from data_prep.pipeline.step import ColumnType, Doc, Outcome, Pass, Step, View
from data_prep.scoring.fitting import library_problems
from data_prep.scoring.ngram_settings import NgramSettings
from data_prep.scoring.ngrams import Ngrams
from data_prep.scoring.topic_model import TopicModel, find_topics
from data_prep.scoring.topic_words import top_words
from data_prep.shard_damage import place_in_run, way_out
from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.errors import UserError
from megatron_sov.sealed import read_json, read_sealed, sealed, write_json
from megatron_sov.settings import AtLeastOne, Problem, as_problem, at_most

_MODEL, _TOPICS = "topics.safetensors", "topics.json"
_MOST_SHOWN = 200
_TIMES, _LEAST_PER_SHARD = 4, 64
"""How many times its even part of the sample a shard may give, and how many it may give in any case."""


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

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
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
        """Return the two passes: a sample of each shard, topics of all samples."""
        return (Pass("sample", self.take_sample), Pass("fit", self.fit, 1))

    def take_sample(self, view: View, task: int) -> None:
        """Write the documents of a shard whose places have the smallest hashes."""
        wanted = min(self.settings.sample, max(_LEAST_PER_SHARD,
                                               _TIMES * self.settings.sample // max(1, len(view.shards))))
        taken: list[tuple[str, str]] = []
        for documents in view.documents(view.shards[task]):
            taken += [(self._hash(document), document.text[: self.settings.max_chars])
                      for document in documents]
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
        atomic_write(view.work / "report.json", to_json(_report(topics, len(texts))))

    def start(self, view: View) -> None:
        """Load the topics."""
        file = view.work / _MODEL
        self._model = TopicModel.from_bytes(read_sealed(file, way_out(file), place_in_run(file)))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Return the topic of each document; null for one without words."""
        assert self._model is not None, "outcomes before start"
        found = []
        for document in documents:
            place = self._model.nearest(self._ngrams.counts(document.text))
            found.append(Outcome(values={"topic": None if place is None else _name(place)}))
        return found

    def _hash(self, document: Doc) -> str:
        return blake2b(f"{self.settings.seed} {document.lot}".encode(), digest_size=16).hexdigest()


def _name(place: int) -> str:
    return f"t{place:02d}"


def _report(topics: Sequence[Mapping[str, Any]], num_sampled: int) -> dict[str, Any]:
    """Return what the page shows."""
    shown = topics[:_MOST_SHOWN]
    return {"tables": [{"title": "Topics", "head": ["topic", "documents of the sample", "words"],
                        "rows": [[t["topic"], t["num_sampled"], ", ".join(t["words"])] for t in shown]}],
            "bars": [{"title": "Documents of the sample per topic", "labels": [t["topic"] for t in shown],
                      "counts": [t["num_sampled"] for t in shown],
                      "note": f"{num_sampled:,} documents were sampled."}],
            "notes": []}
