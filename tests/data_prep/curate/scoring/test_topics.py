"""Topics in a pipeline: planted ones are found, whatever the shards, and named by their words.

Words of a topic: those that the others lack.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.topics import Topics, TopicsSettings, top_words
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_json
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes
from tests.typed_words import keys_of

NGRAMS = Ngrams(NgramSettings())
SUBJECTS = {"cooking": ["onion", "butter", "oven", "simmer", "garlic", "recipe", "flour", "boil"],
            "astronomy": ["orbit", "galaxy", "telescope", "planet", "comet", "nebula", "lunar", "star"],
            "sailing": ["rudder", "mast", "anchor", "harbour", "sail", "keel", "deck", "knot"],
            "요리": ["양파", "버터", "오븐", "마늘", "밀가루", "국물", "볶음", "끓임"]}
FILLER = ["the", "of", "and", "in", "with", "is", "that", "from", "this"]


def documents(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return texts with the subject of each."""
    rng, found = random.Random(seed), []
    for i in range(count):
        name = list(SUBJECTS)[min(3, i % 5)]
        words = [rng.choice(SUBJECTS[name] if rng.random() < 0.5 else FILLER) for _ in range(60)]
        found.append((name, " ".join(words)))
    return found


def topics_of(found: list[tuple[str, str]], work: Path, per_shard: int, **settings: Any) -> list[str | None]:
    texts = [text for _, text in found]
    shards = [docs(*texts[i:i + per_shard], shard=i // per_shard) for i in range(0, len(texts), per_shard)]
    made = outcomes(Topics, TopicsSettings(**settings), MemoryView.of(shards, work))
    return [outcome.values["topic"] for outcome in made.values()]


def test_planted_subjects_are_found_and_named_by_their_words(tmp_path: Path) -> None:
    found = documents(120)
    topics = topics_of(found, tmp_path, 40, num_clusters=4)
    subjects = defaultdict(set)
    for (subject, _), topic in zip(found, topics, strict=True):
        subjects[topic].add(subject)
    assert sorted(map(sorted, subjects.values())) == sorted([name] for name in SUBJECTS)
    (largest,) = subjects["t00"]
    assert largest == "요리"
    record = json.loads((tmp_path / "topics.json").read_text())
    for topic in record["topics"]:
        (subject,) = subjects[topic["topic"]]
        known = SUBJECTS[subject]
        assert len([w for w in topic["words"] if any(w in k for k in known)]) >= 5, topic
        assert topic["num_sampled"] == topics.count(topic["topic"])


def test_a_sample_is_the_same_however_documents_lie(tmp_path: Path) -> None:
    found = documents(150)
    topics_of(found, tmp_path, 50, num_clusters=3, sample=40)
    taken = [text for file in sorted((tmp_path / "sample").iterdir())
             for _, text in read_json(file)]
    assert len(taken) >= 40
    assert json.loads((tmp_path / "topics.json").read_text())["num_sampled"] == 40


def test_a_document_without_words_has_no_topic(tmp_path: Path) -> None:
    topics = topics_of([*documents(80), ("", ""), ("", "\n\n")], tmp_path, 30, num_clusters=4)
    assert topics[-2:] == [None, None]
    assert None not in topics[:-2]


@pytest.mark.parametrize(("texts", "said"), [
    (["a", "b"], "num_clusters = 4 and there are 2 documents; ask for fewer topics"),
    (["the same"] * 9, "num_clusters = 4, and 0 of 9 texts have words that tell them apart"),
])
def test_too_few_documents_are_told(tmp_path: Path, texts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        topics_of([("", text) for text in texts], tmp_path, 5, num_clusters=4)


@pytest.mark.parametrize("settings", [{"num_clusters": 1}, {"num_clusters": 40, "sample": 39}, {"seed": -1},
                                      {"max_chars": 0}])
def test_settings_that_cannot_be_are_told(settings: dict[str, Any]) -> None:
    assert keys_of(TopicsSettings(**settings)) == [next(iter(settings))]
    assert keys_of(TopicsSettings()) == []


def test_words_that_only_one_topic_has_come_first() -> None:
    texts = ["the comet and the moon", "the comet and a star of 1999", "the oven, the flour, oven",
             "the oven and some flour", "nothing of this counts"]
    found = top_words(texts, np.array([0, 0, 1, 1, -1]), 3, NGRAMS)
    assert found == [["comet", "and", "the"], ["flour", "oven", "the"], []]


def test_scripts_without_spaces_give_pairs_of_characters() -> None:
    texts = ["ダムの水", "ダムと山", "ไฟฟ้า", "ไฟฟ้า"]
    found = top_words(texts, np.array([0, 0, 1, 1]), 2, NGRAMS)
    assert found[0] == ["ダム"]
    assert "ฟฟ" in found[1]
