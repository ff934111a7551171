"""The `retrieval` world: BM25 search, reading documents by keys, and tool names from settings."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.judge.tools.worlds.retrieval import Bm25, split_terms

LAWS = [("Civil Code", 1, "A contract is made by offer and acceptance."),
        ("Civil Code", 2, "A minor needs the consent of a guardian for a contract."),
        ("Road Act", 1, "Vehicles keep to the left side of the road."),
        ("กฎหมายจราจร", 1, "รถยนต์ต้องขับชิดซ้าย")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSONL file with the sections in `LAWS`."""
    file = tmp_path / "laws.jsonl"
    file.write_text("".join(json.dumps({"law_name": law, "section_num": number, "content": text}) + "\n"
                            for law, number, text in LAWS))
    return file


def build_law_world(corpus: Path, change: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return the world with tools `search_law` and `read_law`, with changed settings, and begin a task."""
    settings = {"corpus": str(corpus), "text": "content", "keys": ["law_name", "section_num"],
                "search": "search_law", "read": "read_law", "query": "query_list", "queries": "list"}
    settings |= change
    environment = build_versioned_environment(request_environment("retrieval", settings))[0]
    environment.reset({"question": "May a minor make a contract?", "answer": "no"})
    return environment


def test_legal_retrieval_is_a_configuration(corpus: Path) -> None:
    laws = build_law_world(corpus)
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in laws.tools()}
    assert list(tools) == ["search_law", "read_law"]
    assert tools["search_law"]["properties"]["query_list"]["type"] == "array"
    assert tools["read_law"]["required"] == ["law_name"]
    (found,) = laws.call("search_law", {"query_list": ["minor contract guardian"]})
    assert [(r["law_name"], r["section_num"]) for r in found["results"]] == [
        ("Civil Code", 2), ("Civil Code", 1)]
    read = laws.call("read_law", {"law_name": "Civil Code", "section_num": "2"})
    assert [r["content"] for r in read] == [LAWS[1][2]]
    assert len(laws.call("read_law", {"law_name": "Civil Code"})) == 2
    (thai,) = laws.call("search_law", {"query_list": ["ขับรถชิดซ้าย"]})
    assert thai["results"][0]["law_name"] == "กฎหมายจราจร"
    with pytest.raises(ToolFault, match="search for it first"):
        laws.call("read_law", {"law_name": "Penal Code"})
    assert laws.score("The answer is no.").reward == 1


def test_ranks_follow_the_bm25_formula() -> None:
    rng = random.Random(0)
    words = [f"w{int(rng.paretovariate(0.7)) % 50}" for _ in range(4000)]
    documents = [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(200)]
    index, term_lists = Bm25(documents), [split_terms(document) for document in documents]
    mean_length, k1, b = sum(map(len, term_lists)) / len(term_lists), 1.2, 0.75
    for _ in range(20):
        query = rng.choices(words, k=3)
        scores = {}
        for number, terms in enumerate(term_lists):
            score = 0.0
            for term in query:
                num_with_term = sum(term in other for other in term_lists)
                idf = math.log(1 + (len(term_lists) - num_with_term + 0.5) / (num_with_term + 0.5))
                count = terms.count(term)
                score += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * len(terms) / mean_length))
            if score:
                scores[number] = score
        best = sorted(scores.items(), key=lambda entry: (-round(entry[1], 9), entry[0]))[:10]
        found = index.search(" ".join(query), 10)
        assert [number for number, _ in found] == [number for number, _ in best]
        assert [score for _, score in found] == pytest.approx([score for _, score in best])


@pytest.mark.parametrize("change, message", [
    ({"corpus": "nowhere.jsonl"}, 'corpus = "nowhere.jsonl" is no file'),
    ({"read": "search_law"}, "must not be that of search"),
    ({"keys": []}, "keys"), ({"top_k": 0}, "top_k = 0"),
    ({"text": "body"}, ":1: its 'body' must be text"),
    ({"keys": ["law"]}, ":1: has no 'law'"), ({"query": "my query"}, 'query = "my query"')])
def test_invalid_settings_are_named(corpus: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_law_world(corpus, change)


def test_another_corpus_is_another_version(corpus: Path) -> None:
    settings = {"corpus": str(corpus), "keys": ["law_name"]}
    _, version = build_versioned_environment(request_environment("retrieval", settings))
    corpus.write_text(corpus.read_text() + '{"law_name": "x", "text": "y"}\n')
    assert build_versioned_environment(request_environment("retrieval", settings))[1] != version
