"""A step that changes texts edits text records, and rejects conversations that it would change."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from made_runs import GOOD, build_chat, build_sample, finish_run, read_rows, write_run

ADDRESS = "Write to jane.doe@mail.org about it."


def test_masked_texts_pass_and_masked_conversations_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("steps:\n  - pii: {mask: [email]}\n")
    text = write_run(tmp_path / "text",
                     [[build_sample({"text": f"{GOOD} {ADDRESS}"})], [build_sample({"text": GOOD})]])
    chats = write_run(tmp_path / "chats", [[build_sample(build_chat("Where?", ADDRESS))],
                                           [build_sample(build_chat("Where?", "Here."))]])
    finish_run(text, "text", tmp_path / "steps.yaml")
    finish_run(chats, "chat", tmp_path / "steps.yaml")
    masked, other = read_rows(text / "kept.jsonl")
    assert "[email address]" in masked["text"] and "jane" not in masked["text"] and other["text"] == GOOD
    assert [row["synthetic"]["item"] for row in read_rows(chats / "kept.jsonl")] == ["i1"]
    assert [row["reason"] for row in read_rows(chats / "rejected.jsonl")] == ["changed by a step"]
