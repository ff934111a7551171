"""Checks of `sov-data synth` reject a sample that a pipeline step would change, here by masking an e-mail."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from made_runs import GOOD, build_chat, build_sample, finish_run, read_rows, write_run

ADDRESS = "Write to jane.doe@mail.org about it."


def test_samples_that_a_step_would_mask_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("steps:\n  - pii: {mask: [email]}\n")
    texts = write_run(tmp_path / "texts",
                      [[build_sample({"text": f"{GOOD} {ADDRESS}"})], [build_sample({"text": GOOD})]])
    chats = write_run(tmp_path / "chats", [[build_sample(build_chat("Where?", ADDRESS))],
                                           [build_sample(build_chat("Where?", "Here."))]])
    finish_run(texts, "text", tmp_path / "steps.yaml")
    finish_run(chats, "chat", tmp_path / "steps.yaml")
    for folder in (texts, chats):
        assert [row["synthetic"]["item"] for row in read_rows(folder / "kept.jsonl")] == ["i1"]
        assert [row["reason"] for row in read_rows(folder / "rejected.jsonl")] == ["changed by a step"]
