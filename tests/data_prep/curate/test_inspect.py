"""`sov-data inspect`: documents that each step of a pipeline dropped, and the content of token shards."""

import json
from pathlib import Path

import pytest

from data_prep.cli import main
from megatron_sov.base.artifacts import ArtifactWriter
from megatron_sov.base.errors import ExitCode

DROPPED = {"too short": {"documents": 3, "bytes": 30}, "not wanted": {"documents": 20, "bytes": 300},
           "no letters": {"documents": 2, "bytes": 9}, "odd\x1b[2J": {"documents": 1, "bytes": 5}}
SAMPLE = {"id": "web:0:00aa", "reason": "not wanted", "before": "Some\nwords of it.", "after": None}


def write_summary(output: Path) -> None:
    output.mkdir(exist_ok=True)
    counts = {"documents_in": 100, "bytes_in": 5000, "documents_kept": 74, "bytes_kept": 4600,
              "documents_changed": 7, "folder": "shards/web/01-rules-aa", "settings": {}}
    steps = [{"number": 1, "kind": "rules", **counts, "dropped": DROPPED,
              "samples": {"kept": [], "changed": [], "dropped": [SAMPLE]}}]
    (output / "summary.json").write_text(json.dumps({"sources": [{"name": "web", "steps": steps}]}))


def run_inspect(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[str]:
    """Return the lines that `sov-data inspect` prints, or its error lines if it must fail with `code`."""
    assert main(["inspect", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return (captured.err if code else captured.out).splitlines()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_summary(tmp_path / "corpus")
    writer = ArtifactWriter(tmp_path / "corpus", "corpus")
    writer.content = {"num_documents": 74}
    writer.complete()
    return tmp_path / "corpus"


def test_each_step_is_a_line_with_its_most_frequent_reasons(corpus: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_inspect(capsys, corpus)
    [step] = [line for line in lines if "01 rules" in line]
    assert step.split()[:6] == ["web", "01", "rules", "100", "74", "7"]  # documents in, kept, changed
    assert step.endswith("not wanted 20, too short 3, no letters 2, 1 more reasons")
    assert any("web:0:00aa  rules: not wanted: Some words of it." in line for line in lines)
    assert "\x1b" not in "\n".join(lines)


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"sources": [{"name": 3}]}',
                                     '{"sources": [{"name": "a", "steps": [{"number": "x"}]}]}'])
def test_a_damaged_summary_is_one_message(corpus: Path, damaged: str,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "summary.json").write_text(damaged)
    [error] = run_inspect(capsys, corpus, code=2)
    assert error.startswith(f"error: {corpus}/summary.json: is missing or damaged")


def test_files_of_a_corpus_are_compared_with_its_hashes(corpus: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run_inspect(capsys, corpus, "--verify")
    summary = corpus / "summary.json"
    summary.write_text(summary.read_text().replace("74", "75"))
    assert "summary.json" in run_inspect(capsys, corpus, "--verify", code=ExitCode.GATE_FAILED)[0]


def test_a_corpus_of_another_command_has_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "problems.jsonl").write_text('{"problem": "1 + 1?"}\n')
    ArtifactWriter(tmp_path, "corpus").complete()
    lines = run_inspect(capsys, tmp_path)
    assert "artifact of kind corpus" in lines[0] and not any("documents in" in line for line in lines)
    (tmp_path / "pipeline.json").write_text("{}")
    assert "summary.json: is missing" in run_inspect(capsys, tmp_path, code=2)[0]


def test_token_shards_and_foreign_folders_are_inspected(token_shards: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert "artifact of kind tokens" in run_inspect(capsys, token_shards)[0]
    assert "does not exist, and no work on it is unfinished" in run_inspect(capsys, tmp_path / "none",
                                                                            code=2)[0]
    assert "is nothing that megatron-sov has made" in run_inspect(capsys, tmp_path, code=2)[0]
