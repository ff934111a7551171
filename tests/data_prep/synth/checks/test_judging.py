"""A step that changes texts changes records of texts, and rejects what it cannot change."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from made_runs import GOOD, chat, made_run, rows, sample

from data_prep.synth.finishing import finish
from megatron_sov.work.progress.journal import work_folder

ADDRESS = "Write to jane.doe@mail.org about it."


def test_a_masked_text_is_kept_and_a_masked_conversation_is_not(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("steps:\n  - pii: {mask: [email]}\n")
    told = {"role": "system", "content": f"You know this. {ADDRESS}"}
    text = made_run(tmp_path / "text", [[sample({"text": f"{GOOD} {ADDRESS}"})], [sample({"text": GOOD})]])
    chats = made_run(tmp_path / "chats", [[sample(chat("Where?", ADDRESS))],
                                          [sample(chat("Where?", "Here."))],
                                          [sample(chat("Where?", "There.", told))]], kind="chat")
    for folder in (text, chats):
        finish(folder, tmp_path / "steps.yaml")
    masked, other = rows(text / "kept.jsonl")
    assert "[email address]" in masked["text"] and "jane" not in masked["text"] and other["text"] == GOOD
    assert [row["synthetic"]["item"] for row in rows(chats / "kept.jsonl")] == ["i1"]
    assert [row["reason"] for row in rows(chats / "rejected.jsonl")] == ["changed by a step"] * 2


def test_the_same_samples_are_judged_once_and_earlier_work_goes(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("steps:\n  - exact_dedup\n")
    run = made_run(tmp_path / "run", [[sample({"text": GOOD})], [sample({"text": f"{GOOD} More."})]])
    checks = work_folder(run) / "checks"

    def work() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in checks.glob("sh*/**/*.parquet")}

    finish(run, tmp_path / "steps.yaml")
    before = work()
    finish(run, tmp_path / "steps.yaml")
    assert before and work() == before
    (tmp_path / "steps.yaml").write_text("steps:\n  - exact_dedup: {partitions: 2}\n")
    finish(run, tmp_path / "steps.yaml")
    assert len(work()) == len(before) and len(list((checks / "shared").iterdir())) == 1
