"""End of a `sov-data synth` run: accepted and rejected samples with reasons, the manifest, and commands that
read the output."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))
from made_runs import (
    GOOD, OTHER, add_records, build_chat, build_sample, copy_run, finish_run, read_rows, write_run)

from data_prep.cli import main
from data_prep.synth import finishing
from data_prep.synth.checks.settings import DEFAULTS
from megatron_sov.base.artifacts import find_damaged_files, manifest_sha256, read_manifest
from megatron_sov.base.documents import RecordReading, read_documents
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.work.progress.journal import iter_records_by_item, lock_work_folder, work_folder

LEAKED = "Which keeper of the seven lighthouses painted the northern door green before the storm of 1911?"
GERMAN = ("Das ist ein ganz anderer Text über einen Garten, in dem viele Rosen und noch mehr Unkraut stehen, "
          "ohne daß jemand es in den vergangenen Jahren auch nur einmal bemerkt hätte.")


def write_steps(folder: Path, kind: str, *languages: str) -> Path:
    """Write the packaged steps of a kind, with benchmarks and languages as a user adds them."""
    steps = yaml.safe_load((DEFAULTS / f"{kind}.yaml").read_text())["steps"]
    for step in steps:
        if "language" in step and languages:
            step["language"]["keep"] = [*languages]
    steps.append({"decontaminate": {"benchmarks": [str(folder / "benchmark.jsonl")]},
                  "only": {"sources": ["samples"]}})
    (folder / "steps.yaml").write_text(yaml.safe_dump({"steps": steps}))
    return folder / "steps.yaml"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of texts: only the first is accepted, and the others show each reason."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "notes.jsonl").write_text(json.dumps({"text": OTHER}) + "\n")
    (folder / "benchmark.jsonl").write_text(json.dumps({"id": "q7", "question": LEAKED}) + "\n")
    output = write_run(folder / "samples", [
        [build_sample({"text": GOOD})],
        [build_sample({"text": GOOD.upper()}), build_sample({"text": "No number fits."}, "numbers")],
        [build_sample({"text": f"{OTHER} Really."})],
        [build_sample({"text": "one loop and one more loop of it " * 30})],
        [build_sample({"text": GERMAN})],
        [build_sample({"text": f"We were asked: {LEAKED} Nobody knows it now, and the door is gone."})],
        [build_sample({"text": " "})],
    ])
    return finish_run(output, "text", write_steps(folder, "text", "en"), [folder / "notes.jsonl"])


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of conversations with tools and thoughts."""
    chat_with_tools = {"messages": [
        {"role": "user", "content": "Where is order 17, please?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"order": 17}}}]},
        {"role": "tool", "tool_call_id": "a", "content": '{"place": "Busan"}'},
        {"role": "assistant", "content": "It has reached Busan.", "reasoning_content": "It told me."}],
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]}
    folder = tmp_path_factory.mktemp("chats")
    (folder / "benchmark.jsonl").write_text(json.dumps({"question": LEAKED}) + "\n")
    output = write_run(folder / "samples", [
        [build_sample(build_chat("How much is 3 and 4?", "7"))],
        [build_sample(build_chat(GOOD, "8"))],
        [build_sample(chat_with_tools)],
        [build_sample(build_chat(f"Know this: {LEAKED}", "Nobody knows."))],
        [build_sample(build_chat("Say it again.", "say it again and say it once more to me " * 20))],
        [build_sample({"messages": [{"role": "tool", "content": "a result without a call"}]})],
    ])
    return finish_run(output, "chat", write_steps(folder, "chat"))


def test_each_sample_is_accepted_or_rejected_with_a_reason(texts: Path) -> None:
    kept, = read_rows(texts / "kept.jsonl")
    assert (kept["id"], kept["text"]) == ("i0/0", GOOD)
    assert kept["synthetic"] == {
        "sample": "i0/0", "generator": "facts", "model": "writer-7b", "judge": "judge-70b",
        "item": "i0", "source": "notes", "licence": "", "asked": ["key0"], "notes": {"tries": 1}}
    rejected = read_rows(texts / "rejected.jsonl")
    assert [(row["synthetic"]["sample"], row["reason"], row["detail"]) for row in rejected] == [
        ("i1/0", "near duplicate", "the same as i0/0"), ("i1/1", "numbers", "as the generator saw it"),
        ("i2/0", "near duplicate", "the same as input notes.jsonl:1"),
        ("i3/0", "repetition: top 2-gram", ""), ("i4/0", "language de", ""),
        ("i5/0", "text of a benchmark", "benchmark:q7"),
        ("i6/0", "form", "holds no text")]


def test_summary_and_manifest_describe_the_output(texts: Path) -> None:
    summary = json.loads((texts / "summary.json").read_text())
    assert (summary["num_items"], summary["num_samples"], summary["num_kept"], summary["num_rejected"]) == (
        7, 8, 1, 7)
    assert sum(summary["rejected"].values()) == 7 and summary["rejected"]["form"] == 1
    # each of 7 items has a request refused after 0.25 s, and one answered after 1 s (write_run)
    assert summary["costs"] == {
        "num_requests": 14, "num_answered": 7, "outcomes": {"200": 7, "429": 7}, "input_tokens": 700,
        "output_tokens": 350, "seconds": 8.75}
    manifest = read_manifest(texts, "synthesis")
    assert set(manifest.files) == {"kept.jsonl", "rejected.jsonl", "summary.json"}
    assert manifest.content["licences"] == {"": 1} and find_damaged_files(texts) == []


def test_output_does_not_depend_on_the_order_of_finished_items(texts: Path, tmp_path: Path) -> None:
    again = copy_run(texts, tmp_path / "again")
    before = {file.name: file.read_bytes() for file in again.glob("*.jsonl")}
    work = work_folder(again)
    records = [(number, json.loads(record)) for number, record in iter_records_by_item(work)]
    shutil.rmtree(work)
    with lock_work_folder(again, "sov-data synth", {}):  # as if other workers had finished the items
        add_records(again, records[:4][::-1], "1")
        add_records(again, records[4:][::-1], "0")
    (again / "kept.jsonl").write_text("half of")
    finish_run(again, "text", texts.parent / "steps.yaml", [texts.parent / "notes.jsonl"])
    assert {file.name: file.read_bytes() for file in again.glob("*.jsonl")} == before


def test_an_interrupted_finish_leaves_the_previous_files(texts: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    again = copy_run(texts, tmp_path / "again")
    before = {file.name: file.read_bytes() for file in again.glob("*.jsonl")}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finishing, "format_json_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finish_run(again, "text", texts.parent / "steps.yaml")
    assert {file.name: file.read_bytes() for file in again.glob("*.jsonl")} == before
    assert not (again / "manifest.json").exists() and not list(again.glob(".*.tmp-*"))


def test_chats_with_loops_leaks_or_malformed_turns_are_rejected(chats: Path) -> None:
    assert [row["id"] for row in read_rows(chats / "kept.jsonl")] == ["i0/0", "i1/0", "i2/0"]
    assert [(row["synthetic"]["item"], row["reason"]) for row in read_rows(chats / "rejected.jsonl")] == [
        ("i3", "text of a benchmark"), ("i4", "repetition: 10-grams"), ("i5", "form")]


def test_accepted_text_can_be_packed(texts: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """The folder of a synth run is a source, of which only accepted samples are read."""
    tokens = tmp_path / "tokens"
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", f"made={texts}",
                 "--output", str(tokens), "--heldout", "0", "--workers", "1"]) == 0
    manifest = read_manifest(tokens, "tokens")
    source, = manifest.content["sources"]
    assert source["splits"]["train"]["num_documents"] == 1 and source["tags"] == {"synthetic": ["true"]}
    assert manifest_sha256(texts) in [one["manifest_sha256"] for one in manifest.inputs]


def test_accepted_prompts_are_readable_by_rl(tmp_path: Path) -> None:
    output = write_run(tmp_path / "prompts",
                       [[build_sample({"prompt": "How much is 3 and 4?", "answer": "7"})],
                        [build_sample({"prompt": GOOD, "answer": "8"})]])
    prompts = read_prompts(finish_run(output, "prompt") / "kept.jsonl", is_asked=True)
    assert [prompt.record["answer"] for prompt in prompts] == ["7", "8"]


def test_a_run_without_accepted_samples_writes_a_summary(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", [[build_sample({"text": GOOD}, "numbers")], []])
    finish_run(output, is_complete=False)
    assert read_rows(output / "kept.jsonl") == [] and not (output / "manifest.json").exists()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["num_kept"] == 0 and summary["is_complete"] is False


def test_a_damaged_store_of_answers_is_refused(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", [[build_sample({"text": GOOD}, "numbers")]])
    (output / "answers.sqlite").write_text("no database at all" * 100)
    with pytest.raises(UserError, match=r"answers\.sqlite: is no usable store of answers"):
        finish_run(output)


def test_provenance_can_be_a_tag_of_documents(texts: Path) -> None:
    kept, = read_documents([texts / "kept.jsonl"], RecordReading("text", tags=("synthetic",)))
    assert kept.tags == ("true",)
