"""`megatron-sov inspect`: the kind, origin and progress of checkpoints, runs and data."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main as data_main
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.cli import main
from megatron_sov.rollouts.rows import format_part_name
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.work.progress.journal import open_journal, work_folder
from megatron_sov.work.progress.resumable import part_folder
from tests.pages_typed import page_section


@pytest.fixture(autouse=True)
def folder(cwd: Path) -> None:
    """Three artifacts: a, b (made from a) and c (made from b)."""
    for number, name in enumerate(("a", "b", "c")):
        with create_artifact(Path(name), "rows") as artifact:
            (artifact.path / "rows.jsonl").write_text(f'{{"n": {number}}}\n{{"n": "\\u2028"}}\n')
            artifact.content, artifact.settings = {"num_rows": 2}, {"step": "x" * 1000}
            if number:
                artifact.add_input(Path("abc"[number - 1]))


def run_inspect(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["inspect", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_inspect_prints_facts_origins_and_rows_of_an_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_inspect(capsys, "c").split("\n")
    assert lines[0].startswith("c: artifact of kind rows, 1 files, 25 bytes, made 20")
    assert lines[1] == "  content.num_rows: 2" and lines[2].endswith("xxx... (1,000 characters)")
    assert lines[3:5] == ["  made from rows b (here)", "    made from rows a (here)"]
    assert lines[5] == '  row 1: {"n": 2}' and len(lines) == 8
    os.rename("a", "moved")
    assert "made from rows a (not here)" in run_inspect(capsys, "c")
    parsed = json.loads(run_inspect(capsys, "c", "--json", "--rows", "1"))
    assert parsed["made_from"][0]["made_from"][0]["state"] == "not here" and parsed["rows"] == [{"n": 2}]
    assert json.loads(run_inspect(capsys, "c", "--json", "--verify")) == json.loads(
        run_inspect(capsys, "c", "--json"))


def test_verify_fails_if_a_file_is_damaged_or_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "every file has the hash" in run_inspect(capsys, "a", "--verify")
    Path("a/rows.jsonl").write_text("{}\n")
    assert "a/rows.jsonl: has 3 bytes" in run_inspect(capsys, "a", "--verify", code=3)
    Path("a/rows.jsonl").unlink()
    assert "a/rows.jsonl: is missing" in run_inspect(capsys, "a", "--verify", code=3)


def test_missing_files_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a/rows.jsonl").unlink()
    assert main(["inspect", "a", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kind"] == "rows"
    assert printed.err.startswith("warning: a: rows.jsonl is in its manifest.json and missing; copy or")


def test_unfinished_work_is_described_and_can_be_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(Path("out"), "megatron-sov score", {"reward": "x"}
                                                        ) as journal:
        journal.add([(0, b"a"), (1, b"b"), (1, b"c")])
        assert "is being written by another process" in run_inspect(capsys, "out", "--clear", code=2)
        raise KeyboardInterrupt
    output = run_inspect(capsys, "out")
    assert "out: unfinished work of `megatron-sov score` in .out.work: 2 pieces" in output
    assert "identity.reward: x" in output
    assert "is deleted" in run_inspect(capsys, "out", "--clear") and not work_folder(Path("out")).exists()
    part_folder(work_folder(Path("pack")), "ab12").mkdir(parents=True)
    assert "unfinished work of `a command` in .pack.work: 1 pieces" in run_inspect(capsys, "pack")
    assert "no work on a is unfinished" in run_inspect(capsys, "a", "--clear", code=2)


def test_files_without_manifest_are_identified_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"a": 1}\n\n[' + "[" * 100_000 + '\n')
    output = run_inspect(capsys, "rows.jsonl")
    assert output.startswith("rows.jsonl: file of rows, 2 rows, ") and "100,0" in output
    Path("run").mkdir()
    Path("run/events.jsonl").touch()
    assert "run: run; see `megatron-sov status run`" in run_inspect(capsys, "run")
    RolloutStore.create(Path("store"), "sha256:ab", 100)
    output = run_inspect(capsys, "store", "--verify")
    assert "store: rollout store; see `megatron-sov rl store show store PART ROW`" in output
    assert "store: 0 parts, 0 rows" in output and "store: sound as rollout store" in output
    (Path("store/rollouts") / format_part_name(1, 0)).mkdir()
    assert "manifest.json" in run_inspect(capsys, "store", "--verify", code=3)
    Path("other").mkdir()
    assert "other: is nothing that megatron-sov has made" in run_inspect(capsys, "other", code=2)
    assert "none: does not exist, and no work on it" in run_inspect(capsys, "none", code=2)


@pytest.mark.each("change", [
    {"content": [1]}, {"settings": "a"}, {"inputs": {"a": 1}}, {"created_s": "now"}, {"created_s": 1e300},
    {"files": 3}, {"kind": 7, "inputs": ["a", {}]}, {"inputs": [{"path": "a\0b", "kind": "rows"}]}])
def test_a_hostile_manifest_gives_one_sentence_or_escaped_text(change: dict[str, object],
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads(Path("a/manifest.json").read_text())
    Path("a/manifest.json").write_text(json.dumps({**manifest, "sha256": "", **change}))
    assert main(["inspect", "a"]) in (0, 2)
    captured = capsys.readouterr()
    assert "is damaged" in captured.err or "kind" in captured.out


def test_an_empty_or_damaged_table_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = pa.table({"a": pa.array([], pa.int64())})
    for name, write in (("empty", lambda file: pq.write_table(nothing, file)),
                        ("bad", lambda file: file.write_bytes(b"PAR1 no table PAR1"))):
        with create_artifact(Path(name), "corpus") as artifact:
            write(artifact.path / "rows.parquet")
    assert "row 1" not in run_inspect(capsys, "empty")
    assert "rows.parquet cannot be read" in run_inspect(capsys, "bad")


def test_origins_are_followed_once_and_found_after_a_move(capsys: pytest.CaptureFixture[str]) -> None:
    with create_artifact(Path("d"), "rows") as artifact:
        artifact.add_input(Path("c"))
        artifact.add_input(Path("b"))
    lines = run_inspect(capsys, "d").split("\n")
    assert [line for line in lines if "made from" in line] == [
        "  made from rows c (here)", "    made from rows b (here)", "      made from rows a (here)",
        "  made from rows b (as above)"]
    Path("elsewhere").mkdir()
    for name in "abcd":
        os.rename(name, f"elsewhere/{name}")
    assert run_inspect(capsys, "elsewhere/d").count("(here)") == 3


def test_commands_of_the_page_work(capsys: pytest.CaptureFixture[str]) -> None:
    page = page_section("watching.md", "Inspect artifacts")
    os.rename("a", "shards")
    with (pytest.raises(KeyboardInterrupt),
          open_journal(Path("scored.jsonl"), "megatron-sov score", {}) as journal):
        journal.add([(0, b"a")])
        raise KeyboardInterrupt
    lines = [line for block in page.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    for program, *words in map(str.split, lines):
        assert {"megatron-sov": main, "sov-data": data_main}[program](words) == 0, words
    assert "scored.jsonl: its unfinished work is deleted" in capsys.readouterr().out
