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
from megatron_sov.bench import contamination
from megatron_sov.bench.contamination import search_training_data
from megatron_sov.bench.lm.results import read_results
from megatron_sov.bench.score_differences import ScoredResults, read_scored_results
from megatron_sov.cli import main
from megatron_sov.runs.obs.events import EventLog
from tests.run_files import read_run_events

QUESTIONS = ["Which of the four rivers that cross the old town is the longest one of all?",
             "How many stones did the mason carry up the hill on the first day of spring?",
             "Why does the lamp in the northern tower burn longer than the one in the south?",
             "What is it?"]
SCORES = [1.0, 1.0, 0.0, 0.0]


@pytest.fixture
def scored(tmp_path: Path, written_scores: Callable[..., Path]) -> ScoredResults:
    """Return four questions; the first two are answered."""
    result = read_scored_results(written_scores(tmp_path / "out.json", SCORES))
    items = {str(i): dataclasses.replace(result.items["quiz"][str(i)], question=text)
             for i, text in enumerate(QUESTIONS)}
    return dataclasses.replace(result, items={"quiz": items})


def test_items_that_decontamination_removes_are_found(scored: ScoredResults, tmp_path: Path) -> None:
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
    assert result.too_short == {"quiz": 1} and result.num_documents == 4
    told = result.results.tasks["quiz"].contamination
    assert (told.items_hit, told.value_without) == (1, pytest.approx(1 / 3))


def test_token_shards_are_decoded_without_losing_text_between_pieces(scored: ScoredResults, packed_data: Any,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    from megatron_sov.train.data.sources import open_sources

    source = open_sources({str(packed_data.text): 1.0}, 1 << 30)[0]
    tokenizer = Tokenizer.from_file(str(packed_data.tokenizer / "tokenizer.json"))
    documents = source.open_split("train")
    longest = max(range(len(documents.lengths)), key=lambda i: int(documents.lengths[i]))
    words = tokenizer.decode(documents.tokens(longest, 0, int(documents.lengths[longest])).tolist()).split()
    asked = " ".join(words[len(words) // 2 - 7:len(words) // 2 + 7])
    items = {"quiz": {"0": dataclasses.replace(scored.items["quiz"]["0"], question=asked)}}
    one = dataclasses.replace(scored, items=items)
    whole = search_training_data(one, [packed_data.text], RecordReading(), 1, show_progress=False)
    assert any(hit.where == f"{packed_data.text}: {source.name}, document {longest}" for hit in whole.hits)
    monkeypatch.setattr(contamination, "PIECE_TOKENS", 150)
    monkeypatch.setattr(contamination, "OVERLAP_TOKENS", 100)
    cut = search_training_data(one, [packed_data.text], RecordReading(), 1, show_progress=False)
    assert len(cut.hits) == len(whole.hits) == 1 and cut.num_documents == whole.num_documents


def test_the_command_writes_results_places_and_events(tmp_path: Path, written_scores: Callable[..., Path],
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    out, run = written_scores(tmp_path / "out.json", SCORES), tmp_path / "run"
    run.mkdir()
    EventLog(run / "events.jsonl").write("run_start")
    train = tmp_path / "train.txt"
    train.write_text("What is question number 2 of this little quiz about? Nobody knows.")
    before = (tmp_path / "out.items.jsonl").read_bytes()
    argv = ["eval", "contamination", str(out), "--data", str(train), "--workers", "1"]
    assert main([*argv, "--run", str(run)]) == 0
    assert "quiz: 1 of 4 items found; acc 0.5000, 0.6667 without them" in capsys.readouterr().out
    assert read_results(out).tasks["quiz"].contamination.items_hit == 1
    assert (tmp_path / "out.items.jsonl").read_bytes() == before and read_scored_results(out)
    assert json.loads((tmp_path / "out.hits.json").read_text())[0]["item"] == "2"
    (event,) = read_run_events(run, "eval_contamination")
    assert (event["task"], event["items_hit"], event["metric"]) == ("quiz", 1, "acc")
    for bad, said in ((["--data", str(tmp_path / "no")], "does not exist"),
                      (["--workers", "0"], "at least 1"), (["--run", str(tmp_path / "no")], "is not a run")):
        assert main([*argv, *bad]) == 2
        assert said in capsys.readouterr().err
