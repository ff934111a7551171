"""Repeated pipeline runs: a change repeats the affected stages and all later ones, and nothing else."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.curate.inspect_run import iter_step_lines
from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from tests.data_prep.curate.pipeline.memory_view import read_files

Done = list[tuple[str, str, int]]
"""Type of the fixture `finished_tasks`."""


def run_pipeline(small_run: Path, *words: str, code: int = 0) -> Path:
    """Run the pipeline in this process, expect the exit code, and return the output folder."""
    assert cli.main(["run", str(small_run / "pipeline.yaml"), "--output", str(small_run / "out"), "--workers",
                     "1", *words]) == code
    return small_run / "out"


def change_pipeline(small_run: Path, before: str, after: str) -> None:
    """Replace the first `before` in pipeline.yaml by `after`."""
    text = (small_run / "pipeline.yaml").read_text()
    assert before in text
    (small_run / "pipeline.yaml").write_text(text.replace(before, after, 1))


def read_first_words(output: Path) -> dict[str, list[str]]:
    """Return output name -> first two words of each of its documents."""
    return {folder.name: [" ".join(text.split()[:2]) for file in sorted(folder.glob("*.parquet"))
                          for text in pq.read_table(file)["text"].to_pylist()]
            for folder in sorted((output / "text").iterdir())}


def test_documents_go_through_the_steps_to_their_names(small_run: Path) -> None:
    output = run_pipeline(small_run)
    assert read_first_words(output) == {  # equal texts are kept of the source with the higher priority
        "books-long": ["text 4", "text 5", "text 6", "text 7"],
        "web-long": ["text 2", "text 3"], "web-short": ["text 0", "text 1"]}
    table = pq.read_table(output / "text/books-long/00000.parquet")
    assert table.column_names[:2] == ["id", "text"] and set(table["licence"].to_pylist()) == {None}
    assert pq.read_table(output / "text/web-short/00000.parquet")["licence"].to_pylist() == ["CC-BY-4.0"] * 2
    summary = json.loads((output / "summary.json").read_text())
    web = summary["sources"][0]
    assert [(s["kind"], s["documents_in"], s["documents_kept"]) for s in web["steps"]] == [
        ("parse", 6, 6), ("shorten", 6, 6), ("unique", 6, 4), ("shorten", 4, 4)]
    account = summary["account"]
    assert account["num_written"] == 8 == account["num_read"] - sum(account["set_aside"].values())
    # texts 4 and 5, which the first step cut to 400 characters
    assert web["steps"][2]["dropped"] == {"seen before": {"documents": 2, "bytes": 800}}
    assert (output / web["steps"][2]["folder"]).is_dir()
    assert summary["output"][0] == {"name": "books-long", "num_shards": 2, "num_documents": 4,
                                    "num_bytes": 4 * 300}
    assert sorted(file.name for file in (output / "text/books-long").iterdir()) == [
        "00000.parquet", "00001.parquet"]
    assert "seen before 2" in "\n".join(iter_step_lines(output))


def test_complete_stages_are_not_repeated(small_run: Path, finished_tasks: Done,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    output = run_pipeline(small_run)
    before, num_tasks = read_files(output / "text"), len(finished_tasks)
    run_pipeline(small_run)
    assert len(finished_tasks) == num_tasks and "complete from before" in capsys.readouterr().out
    manifest = read_manifest(output, "corpus")
    assert find_damaged_files(output) == [] and manifest.content["num_documents"] == 8
    assert not any(name.startswith(("shards/", "logs/")) for name in manifest.files)
    assert read_files(output / "text") == before
    shutil.rmtree(output / "text")
    run_pipeline(small_run)
    assert len(finished_tasks) == num_tasks and "complete from before" not in capsys.readouterr().out
    assert read_files(output / "text") == before, "deleted output is written again"


def test_a_changed_setting_repeats_its_step_and_later_ones(small_run: Path, finished_tasks: Done) -> None:
    output = run_pipeline(small_run)
    all_tasks, first_files = sorted(finished_tasks), read_files(output / "text")
    finished_tasks.clear()
    change_pipeline(small_run, "longest: 300", "longest: 200")
    run_pipeline(small_run)
    assert {stage for stage, _, _ in finished_tasks} == {"03-shorten", "04-output"}
    assert sorted(finished_tasks) == [task for task in all_tasks if task[0] in ("03-shorten", "04-output")]
    assert read_files(output / "text") != first_files
    finished_tasks.clear()
    change_pipeline(small_run, "longest: 200", "longest: 300")
    run_pipeline(small_run)
    assert finished_tasks == [], "the folders of the first run are reused"
    assert read_files(output / "text") == first_files


def test_a_changed_source_repeats_its_stages_and_global_steps(small_run: Path, finished_tasks: Done) -> None:
    run_pipeline(small_run)
    all_stages = {stage for stage, _, _ in finished_tasks}
    finished_tasks.clear()
    (small_run / "books/9.txt").write_text("a new book " * 30)
    run_pipeline(small_run)
    assert {stage for stage, source, _ in finished_tasks if source != "web"} == all_stages
    # the other source repeats the step on all documents and what follows
    stages_of_web = {stage for stage, source, _ in finished_tasks if source == "web"}
    assert stages_of_web == {"02-unique", "03-shorten", "04-output"}


def test_a_source_outside_a_steps_filter_is_not_repeated(small_run: Path, finished_tasks: Done) -> None:
    change_pipeline(small_run, "  - unique: {}\n", "  - unique: {}\n    only: {sources: [books]}\n")
    change_pipeline(small_run, "  - shorten: {longest: 300}\n", "")
    output = run_pipeline(small_run)
    assert "text 4" in read_first_words(output)["web-long"], "web keeps texts that books have too"
    finished_tasks.clear()
    (small_run / "books/9.txt").write_text("a new book " * 30)
    run_pipeline(small_run)
    assert {source for _, source, _ in finished_tasks} == {"books", ""}  # "": tasks over all sources


def test_kinds_are_filtered_row_by_row(small_run: Path) -> None:
    change_pipeline(small_run, "  - shorten: {longest: 300}\n",
                    "  - shorten: {longest: 20}\n    only: {kinds: [en]}\n")
    output = run_pipeline(small_run)
    assert set(read_first_words(output)) == {"books-long", "web-long"}
    tables = {name: pq.read_table(output / f"text/{name}/00000.parquet") for name in read_first_words(output)}
    lengths = {name: {len(text) for text in table["text"].to_pylist()} for name, table in tables.items()}
    assert lengths == {"books-long": {400}, "web-long": {20}}


def test_broken_records_are_listed_or_stop_the_run(small_run: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    (small_run / "web/bad.jsonl").write_text('{"text": "fine, and long enough"}\n{"text": 3\n')
    output = run_pipeline(small_run)
    (bad,) = [json.loads(line) for line in (output / "quarantine/web.jsonl").read_text().splitlines()]
    assert bad["file"] == "bad.jsonl" and bad["content"].startswith('{"text": 3')
    assert json.loads((output / "summary.json").read_text())["sources"][0]["quarantine"] == {bad["code"]: 1}
    change_pipeline(small_run, "shard_bytes", "on_bad: refuse\nshard_bytes")
    run_pipeline(small_run, code=2)
    assert "bad.jsonl" in capsys.readouterr().err


def test_a_run_that_keeps_no_document_is_refused(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_pipeline(small_run, "shorten: {longest: 400}", "shorten: {not_below: 1000000}")
    output = run_pipeline(small_run, code=2)
    stderr = capsys.readouterr().err
    assert "no document is kept" in stderr and "shorten: too short" in stderr
    assert not (output / "manifest.json").exists() and (output / "summary.json").is_file()


def test_invalid_unicode_in_names_and_fields_is_replaced(small_run: Path) -> None:
    """File names that are not valid UTF-8, and halves of surrogate pairs inside fields."""
    (small_run / "web" / os.fsdecode(b"na\xefve.txt")).write_text("text 0 " * 20)
    (small_run / "web" / "half.jsonl").write_text(json.dumps({"text": "text 1 " * 20, "own": {"a": "x\ud800"},
                                                              "own_id": "\ud800", "title": "\x1b[2J"}))
    rows = [row for file in (run_pipeline(small_run) / "text").rglob("*.parquet")
            for row in pq.read_table(file).to_pylist()]
    row_by_place = {row["where"]: row for row in rows}
    assert "na\\xefve.txt" in row_by_place
    half = row_by_place["half.jsonl:1"]
    assert (half["extra"], half["own_id"], half["title"]) == ('{"own": {"a": "x?"}}', "?", "\\x1b[2J")


def test_a_source_of_a_wrong_format_does_not_fill_the_disk(small_run: Path, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    monkeypatch.setattr("data_prep.curate.pipeline.tasks.MAX_LISTED", 3)
    (small_run / "web" / "wrong.jsonl").write_text("no json\n" * 50)
    output = run_pipeline(small_run)
    rows = [json.loads(line) for line in (output / "quarantine/web.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == ["json"] * 3 + ["more"] and "47 more" in rows[3]["reason"]
    assert json.loads((output / "summary.json").read_text())["sources"][0]["quarantine"] == {"json": 50}


def test_leftovers_of_earlier_runs_and_kills_are_not_in_the_corpus(small_run: Path) -> None:
    output = run_pipeline(small_run)
    (output / ".text.old-1/name").mkdir(parents=True)
    (output / ".text.old-1/name/00000.parquet").write_text("left behind between two renames")
    change_pipeline(small_run, "  - name: books\n    path: [books]\n    priority: 1\n", "")
    run_pipeline(small_run)
    files = read_manifest(output, "corpus").files
    assert "quarantine/web.jsonl" in files
    assert not [name for name in files if "books" in name or name.startswith(".")]


def run_dry(small_run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a dry run prints."""
    capsys.readouterr()
    run_pipeline(small_run, "--dry-run")
    return capsys.readouterr().out


def test_a_dry_run_lists_the_remaining_shards(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(small_run)
    assert "complete from before, nothing is done" in run_dry(small_run, capsys)
    change_pipeline(small_run, "longest: 300", "longest: 200")
    text = run_dry(small_run, capsys)
    assert "01-shorten: 4 of 4 shards done" in text and "03-shorten: 0 of 4 shards done" in text
    assert (small_run / "out/manifest.json").is_file(), "a dry run deletes nothing"
