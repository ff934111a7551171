"""Evaluation items in training text: the search of `sov-data` finds them in text files and token shards."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.decontamination.step import BenchmarkSearchSettings
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.bench.contamination import TaskContamination, search_training_data
from megatron_sov.bench.score_differences import ScoredResults, read_scored_results

QUESTIONS = ["Which of the four rivers that cross the old town is the longest one of all?",
             "How many stones did the mason carry up the hill on the first day of spring?",
             "Why does the lamp in the northern tower burn longer than the one in the south?",
             "What is it?"]
SCORES = [1.0, 1.0, 0.0, 0.0]


@pytest.fixture
def scored(tmp_path: Path, written_scores: Callable[..., Path]) -> ScoredResults:
    """Results of four questions; the first two were answered correctly."""
    result = read_scored_results(written_scores(tmp_path / "out.json", SCORES))
    items = {str(i): dataclasses.replace(result.items["quiz"][str(i)], question=text)
             for i, text in enumerate(QUESTIONS)}
    return dataclasses.replace(result, items={"quiz": items})


def test_items_that_decontamination_removes_are_found(scored: ScoredResults, tmp_path: Path) -> None:
    # no item; item 0 in another spelling; too few words of item 2; item 3, which is too short to search
    texts = ["nothing here", "Asked: WHICH of the four rivers that cross the *old town* is the longest",
             "the lamp in the northern tower burns longer", QUESTIONS[3]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps({"id": i, "question": q}) + "\n"
                                                  for i, q in enumerate(QUESTIONS)))
    search = BenchmarkSearchSettings(benchmarks=(tmp_path / "bench.jsonl",)).build_search()
    expected = {search.items[f.item].id for t in texts for f in search.find(find_units(t))}
    result = search_training_data(scored, [tmp_path / "train.jsonl"], RecordReading(), 1, show_progress=False)
    assert {hit.item for hit in result.hits} == expected == {"0"}
    assert result.hits[0].where.endswith("train.jsonl:2") and result.hits[0].field == "question"
    assert result.num_documents == 4
    # one of four items found, one too short; accuracy of all items, and of the other three
    # items, items found, items too short to search, metric, its value, its value without the found items
    assert result.tasks == {"quiz": TaskContamination(4, 1, 1, "acc", 0.5, pytest.approx(1 / 3))}


def test_packed_documents_are_decoded(scored: ScoredResults, packed_data: Any) -> None:
    from tokenizers import Tokenizer

    from megatron_sov.train.data.sources import open_sources

    source = open_sources({str(packed_data.text): 1.0}, 1 << 30)[0]
    tokenizer = Tokenizer.from_file(str(packed_data.tokenizer / "tokenizer.json"))
    documents = source.open_split("train")
    longest = max(range(len(documents.lengths)), key=lambda i: int(documents.lengths[i]))
    words = tokenizer.decode(documents.tokens(longest, 0, int(documents.lengths[longest])).tolist()).split()
    # 14 words from the middle of the longest document
    asked = " ".join(words[len(words) // 2 - 7:len(words) // 2 + 7])
    items = {"quiz": {"0": dataclasses.replace(scored.items["quiz"]["0"], question=asked)}}
    one = dataclasses.replace(scored, items=items)
    found = search_training_data(one, [packed_data.text], RecordReading(), 1, show_progress=False)
    assert [hit.where for hit in found.hits] == [f"{packed_data.text}: {source.name}, document {longest}"]


def test_the_command_prints_figures_and_writes_positions(tmp_path: Path, written_scores: Callable[..., Path],
                                                         read_output: Any, get_refusal: Any) -> None:
    out = written_scores(tmp_path / "out.json", SCORES)
    train = tmp_path / "train.txt"
    train.write_text("What is question number 2 of this little quiz about? Nobody knows.")
    argv = ["eval", "contamination", str(out), "--data", str(train), "--workers", "1"]
    table = read_output(*argv).splitlines()
    # task, metric, value, value without the items found, items, found, too short
    assert table[1].split() == ["quiz", "acc", "0.5000", "0.6667", "4", "1", "0"]
    written = json.loads((tmp_path / "out.hits.json").read_text())
    assert written["hits"][0]["item"] == "2" and written["tasks"]["quiz"]["items_hit"] == 1
    for bad, message in ((["--data", str(tmp_path / "no")], "does not exist"),
                         (["--workers", "0"], "at least 1"),
                         (["--run", str(tmp_path)], "--run: was removed")):
        assert message in get_refusal(*argv, *bad)
