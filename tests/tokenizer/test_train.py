"""`sov-tokenizer train`: the artifact, as transformers loads it, and the command's manners."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_sov.artifacts import read_manifest
from tokenizer.cli import main

PROSE = "The quick brown fox jumps over the lazy dog. 다람쥐 헌 쳇바퀴에 타고파. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "prose.txt").write_text(PROSE)
    lines = [{"text": "def f(x):\n    return x + 1\n" * 9}, {"messages": [{"role": "user", "content": "hello there, hello"}]}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def train(preset: str, corpus: Path, output: Path, *more: str) -> int:
    return main(["train", "--preset", preset, "--vocab-size", "384", "--input", f"{corpus / 'prose.txt'}:1",
                 "--input", f"{corpus / 'more.jsonl'}:1", "--output", str(output), *more])


@pytest.fixture(scope="module", params=["solar-open", "k-exaone"])
def trained(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "tokenizer"
    assert train(request.param, corpus, output) == 0
    return output


def test_manifest_states_the_facts(trained: Path) -> None:
    content = read_manifest(trained, "tokenizer").content
    assert content["vocab_size"] == 384
    assert content["tokenizer_sha256"] == hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest()
    expected = {"solar-open": (1, 2, 2), "k-exaone": (1, 53, 0)}[content["preset"]]
    assert (content["bos_id"], content["eos_id"], content["pad_id"]) == expected
    assert [Path(p).name for p in content["bytes_per_token"]] == ["prose.txt", "more.jsonl"]
    assert all(ratio > 1.2 for ratio in content["bytes_per_token"].values())


def test_transformers_loads_it_and_adds_nothing(trained: Path) -> None:
    content = read_manifest(trained).content
    loaded = AutoTokenizer.from_pretrained(trained)
    assert len(loaded) == 384 and loaded.clean_up_tokenization_spaces is False
    for name in ("bos", "eos", "pad"):
        assert getattr(loaded, f"{name}_token_id") == content[f"{name}_id"]
    text = "The fox , it 's 다람쥐 ?\n\n  end"
    ids = loaded.encode(text)
    assert not {content["bos_id"], content["eos_id"]} & set(ids)
    assert loaded.decode(ids) == text


def test_chat_template(trained: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(trained)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == {
        "solar-open": "<|begin|>user<|content|>Hi<|end|><|begin|>assistant<|content|>Yes<|end|><|begin|>assistant<|content|>",
        "k-exaone": "<|user|>\nHi<|endofturn|><|assistant|>\nYes<|endofturn|><|assistant|>\n",
    }[read_manifest(trained).content["preset"]]


def test_the_same_input_gives_the_same_file_in_another_process(trained: Path, corpus: Path, tmp_path: Path) -> None:
    preset = read_manifest(trained).content["preset"]
    command = [sys.executable, "-m", "tokenizer.cli", "train", "--preset", preset, "--vocab-size", "384", "--input",
               f"{corpus / 'prose.txt'}:1", "--input", f"{corpus / 'more.jsonl'}:1", "--output", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, env={"RAYON_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2])
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_mistakes_cost_one_sentence_and_leave_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new"
    base = ["train", "--preset", "solar-open", "--output", str(output)]
    mistakes = {
        "error: --vocab-size 9000: the text is too small": ["--vocab-size", "9000", "--input", str(corpus)],
        f"error: {tmp_path}/none: does not exist": ["--vocab-size", "384", "--input", f"{tmp_path}/none"],
        "error: --input 'x:0': weight 0 must be": ["--vocab-size", "384", "--input", "x:0"],
    }
    for sentence, arguments in mistakes.items():
        assert main([*base, *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_one_is_replaced_only_on_request(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("solar-open", corpus, tmp_path / "t") == 0
    assert train("solar-open", corpus, tmp_path / "t") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train("k-exaone", corpus, tmp_path / "t", "--overwrite") == 0
    assert read_manifest(tmp_path / "t").content["preset"] == "k-exaone"
