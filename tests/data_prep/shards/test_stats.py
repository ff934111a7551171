"""`sov-data stats` and `sample`: the numbers and the texts are those of what was packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_prep.cli import main
from data_prep.shards.pack import PackSettings, PackSource, pack
from data_prep.shards.sample import sample
from data_prep.shards.stats import statistics
from megatron_sov.base.documents import RecordReading

ANSWERS = [f"{i} and {'more ' * (i % 7)}" for i in range(40)]


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    lines = [{"messages": [{"role": "user", "content": "Go on?"}, {"role": "assistant", "content": a}]}
             for a in ANSWERS]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(tokenizers["solar-open"], [PackSource("chat", folder / "chat.jsonl")], folder / "out",
         PackSettings(0.2, RecordReading("chat")))
    return folder / "out"


def test_a_tokenizer_that_cannot_be_read_costs_a_sentence(chats: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(chats, tmp_path / "out")
    (tmp_path / "out/tokenizer/tokenizer.json").write_text('{"added_tokens": [5]}')
    assert main(["stats", str(tmp_path / "out")]) == 2
    assert "tokenizer.json: cannot be read as a tokenizer (TypeError" in capsys.readouterr().err


def test_statistics_are_those_of_transformers_rendering(chats: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chats / "tokenizer")
    chats_ = [[{"role": "user", "content": "Go on?"}, {"role": "assistant", "content": a}] for a in ANSWERS]
    rendered = [[*tokenizer.apply_chat_template(c, tokenize=True, return_dict=False), tokenizer.eos_token_id]
                for c in chats_]
    found = statistics(chats)
    s = found["sources"]["chat"]
    assert (s["num_documents"], s["num_tokens"]) == (40, sum(map(len, rendered)))
    assert s["longest_tokens"] == max(map(len, rendered))
    assert s["special_tokens"] == {"<|endoftext|>": 40, "<|begin|>": 80, "<|end|>": 80, "<|content|>": 80}
    responses = sum(len(tokenizer.encode(a)) + 1 for a in ANSWERS)
    assert (s["num_response_tokens"], s["num_prompt_tokens"]) == (responses, s["num_tokens"] - responses)
    for limit, count in s["documents_up_to_tokens"].items():
        assert count == sum(limit / 2 < len(r) <= limit for r in rendered)
    used = {id_ for r in rendered for id_ in r}
    assert found["num_unused_ordinary_ids"] == sum(id_ not in used for id_ in range(64, 384))
    assert main(["stats", str(chats)]) == 0
    assert "chat: 40 documents" in capsys.readouterr().out
    assert main(["stats", str(chats), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"]["chat"]["num_tokens"] == s["num_tokens"]


def test_samples_mark_what_is_learned(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = sample(chats, "chat", "train", 100, 1000, seed=0)
    headings, texts = lines[::3], lines[1::3]
    assert headings[0].startswith("== chat/train, document 0, ")
    begin = "<|begin|>user<|content|>Go on?<|end|><|begin|>assistant<|content|>"
    assert set(texts) < {f"{begin}⟦{a}<|end|>⟧<|endoftext|>" for a in ANSWERS}
    assert len(set(texts)) == len(texts) > 20
    few = sample(chats, None, "train", 2, 5, seed=1)
    assert len(few) == 6 and all("tokens, the first 5" in h for h in few[::3])
    assert few == sample(chats, None, "train", 2, 5, seed=1)
    assert main(["sample", str(chats), "--source", "none"]) == 2
    assert "has no such source (sources: chat)" in capsys.readouterr().err
    for wrong in (["--count", "-1"], ["--max-tokens", "0"]):
        assert main(["sample", str(chats), *wrong]) == 2
        assert f"{wrong[0]} {wrong[1]}: must be at least 1" in capsys.readouterr().err


def test_both_sides_of_a_preference_are_named(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}\n')
    pack(tokenizers["k-exaone"], [PackSource("p", tmp_path / "p.jsonl")], tmp_path / "out",
         PackSettings(0, RecordReading("preference")))
    shown = sample(tmp_path / "out", None, "train", 9, 100, seed=0)
    assert "document 0, chosen" in shown[0] and "⟦Blue.<|endofturn|>⟧" in shown[1]
    assert "document 1, rejected" in shown[3] and "⟦Green.<|endofturn|>⟧" in shown[4]
