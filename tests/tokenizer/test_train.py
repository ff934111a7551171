"""`sov-tokenizer train`: the artifact as transformers loads it, equal bytes for any workers, messages."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_sov.base.artifacts import read_manifest
from tests.waiting import wait_until
from tokenizer.bpe import count_pipeline
from tokenizer.cli import main

PROSE = "The quick brown fox jumps over the lazy dog. 다람쥐 헌 쳇바퀴에 타고파. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text file and a file of a text and a chat."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "prose.txt").write_text(PROSE)
    lines = [{"text": "def f(x):\n    return x + 1\n" * 9},
             {"messages": [{"role": "user", "content": "hello there, hello"}]}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def train(preset: str, corpus: Path, output: Path, *more: str) -> int:
    """Train a tokenizer of 384 ids on both files with equal weights; return the exit code."""
    return main(["train", "--preset", preset, "--vocab-size", "384", "--input",
                 f"prose={corpus / 'prose.txt'}:1", "--input", f"more={corpus / 'more.jsonl'}:1", "--output",
                 str(output), *more])


def hash_tokenizer(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=["solar-open", "k-exaone"])
def trained(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer trained with a preset."""
    output = tmp_path_factory.mktemp("out") / "tokenizer"
    assert train(request.param, corpus, output) == 0
    return output


def test_manifest_states_the_facts(trained: Path) -> None:
    manifest = read_manifest(trained, "tokenizer")
    content = manifest.content
    assert content["vocab_size"] == 384
    assert content["tokenizer_sha256"] == hash_tokenizer(trained)
    expected = {"solar-open": (1, 2, 2), "k-exaone": (1, 53, 0)}[content["preset"]]
    assert (content["bos_id"], content["eos_id"], content["pad_id"]) == expected
    assert list(content["bytes_per_token"]) == ["more", "prose"]
    assert all(ratio > 1.2 for ratio in content["bytes_per_token"].values())
    assert "tiktoken and transformers give the same ids" in content["checked"]
    assert (content["num_superwords"] > 10) == (content["preset"] == "k-exaone")
    assert [(g["group"], g["weight"]) for g in manifest.settings["groups"]] == [("more", 1), ("prose", 1)]
    num_stages = 2 if content["preset"] == "k-exaone" else 1
    assert [stage["dropped_words"] for stage in manifest.settings["stages"]] == [0] * num_stages


def test_transformers_loads_the_tokenizer_without_changes(trained: Path) -> None:
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
        "solar-open": "<|begin|>user<|content|>Hi<|end|><|begin|>assistant<|content|>Yes<|end|><|begin|"
                      ">assistant<|content|>",
        "k-exaone": "<|user|>\nHi<|endofturn|><|assistant|>\nYes<|endofturn|><|assistant|>\n",
    }[read_manifest(trained).content["preset"]]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 500 KB of text in three files, whose lines are drawn from 300 different ones."""
    folder, rng = tmp_path_factory.mktemp("large"), random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnop가나다라마", k=rng.randint(2, 9))) for _ in range(3000)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=90))}) for _ in range(300)]
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("\n".join(rng.choices(lines, k=500 - 125 * i)))
    return folder


def build_command(folder: Path, output: Path, *more: str) -> list[str]:
    """Return the words of a `train` command with superwords on the three files of `large`."""
    inputs = [f"a={folder / '0.jsonl'}:2", f"b={folder / '1.jsonl'}:1", f"b={folder / '2.jsonl'}"]
    return ["train", "--preset", "k-exaone", "--vocab-size", "1000",
            *(word for i in inputs for word in ("--input", i)), "--superword-sample-mb", "0.5", "--output",
            str(output), *more]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units of counting, so that this text has as many units and workers as a much larger one."""
    monkeypatch.setattr(count_pipeline, "UNIT_BYTES", 37_500)
    monkeypatch.setattr(count_pipeline, "WORKER_BYTES", 37_500)


@pytest.fixture(scope="module")
def large_sha256(large: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the tokenizer.json that one worker trains on `large`."""
    output = tmp_path_factory.mktemp("out") / "tokenizer"
    assert main(build_command(large, output, "--workers", "1")) == 0
    return hash_tokenizer(output)


@pytest.mark.deep
@pytest.mark.usefixtures("small_units")
def test_workers_file_names_order_and_memory_do_not_matter(large: Path, large_sha256: str,
                                                           tmp_path: Path) -> None:
    # the same text with another order of lines, other file names, and one file compressed
    other = tmp_path / "other"
    other.mkdir()
    for i, name in ((0, "0.jsonl"), (1, "2.jsonl"), (2, "1.jsonl")):
        lines = (large / f"{i}.jsonl").read_text().splitlines()
        (other / name).write_text("\n".join(reversed(lines)))
    (other / "1.jsonl.gz").write_bytes(gzip.compress((other / "1.jsonl").read_bytes(), 1))
    arguments = [a.replace("/2.jsonl", "/1.jsonl.gz") if a.startswith("b=") and a.endswith("2.jsonl") else
                 a.replace("/1.jsonl:", "/2.jsonl:") for a in build_command(other, tmp_path / "t")]
    assert main([*arguments, "--workers", "2", "--max-memory-gb", "2"]) == 0
    assert hash_tokenizer(tmp_path / "t") == large_sha256


@pytest.mark.deep
@pytest.mark.usefixtures("small_units")
def test_a_killed_command_resumes_to_the_same_file(large: Path, large_sha256: str, tmp_path: Path) -> None:
    program = ("import sys, tokenizer.bpe.count_pipeline as p; p.UNIT_BYTES = 37_500; "
               "from tokenizer.cli import main; main(sys.argv[1:])")
    work = tmp_path / ".t.work"
    command = [sys.executable, "-c", program, *build_command(large, tmp_path / "t", "--workers", "1")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root) as process:
        wait_until(lambda: list(work.glob("*.arrow")), lambda: process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "t").exists()
    assert len(list(work.glob("*.json"))) < 12  # fewer than all units
    assert main(build_command(large, tmp_path / "t")) == 0
    assert hash_tokenizer(tmp_path / "t") == large_sha256
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_mistakes_give_one_sentence_and_no_output(corpus: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    base = ["train", "--output", str(output)]

    def format_size(num_tokens: int, source: object = corpus) -> list[str]:
        return ["--vocab-size", str(num_tokens), "--input", str(source)]

    small = format_size(384)
    solar, exaone = ["--preset", "solar-open"], ["--preset", "k-exaone"]
    mistakes = {
        "error: --vocab-size 9000: the text is too small for it, only": [*solar, *format_size(9000)],
        "(pairs must occur at least 2 times); give it about": [*exaone, *format_size(9000)],
        "error: --vocab-size 300: must be at least 320": [*solar, *format_size(300)],
        f"error: {tmp_path}/none: does not exist": [*solar, *format_size(384, f"{tmp_path}/none")],
        "error: --input 'x:0': weight 0 must be": [*solar, *format_size(384, "x:0")],
        "empty.txt holds no text": [*solar, *small, "--input", f"{tmp_path}/empty.txt"],
        "latin.txt: is not UTF-8 (byte 0xfc at offset 1)": [*solar, *small, "--input",
                                                            f"{tmp_path}/latin.txt"],
        "asks for its": [*solar, *format_size(384, f"{corpus}/prose.txt:1"), "--input",
                         f"{tmp_path}/tiny.txt:1"],
        "--superword-share 0.2: preset solar-open has no superword_pattern": [*solar, *small,
                                                                              "--superword-share", "0.2"],
        "--superword-share 1: must be below 1": [*exaone, *small, "--superword-share", "1"],
        "--transition-size 100: must lie between 320": [*exaone, *small, "--transition-size", "100"],
        "--max-superword-words 1: must be at least 2": [*exaone, *small, "--max-superword-words", "1"],
        "--superword-sample-mb 0: must be above 0": [*exaone, *small, "--superword-sample-mb", "0"],
        "--max-memory-gb 0.5: must be at least 1": [*solar, *small, "--max-memory-gb", "0.5"],
        "--superword-sample-mb inf: must be a finite number": [*exaone, *small, "--superword-sample-mb",
                                                               "inf"],
        "--max-memory-gb inf: must be a finite number": [*solar, *small, "--max-memory-gb", "inf"],
        "--workers 0: must be at least 1": [*solar, *small, "--workers", "0"],
        "--mixture k-exaone: has no group": [*exaone, *small, "--mixture", "k-exaone"],
    }
    for sentence, arguments in mistakes.items():
        assert main([*base, *arguments]) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error
    assert not output.exists()


@pytest.mark.deep
def test_number_of_superwords_is_as_requested(corpus: Path, tmp_path: Path) -> None:
    assert train("k-exaone", corpus, tmp_path / "none", "--superword-share", "0") == 0
    assert read_manifest(tmp_path / "none").content["num_superwords"] == 0
    assert train("k-exaone", corpus, tmp_path / "by-share", "--superword-share", "0.1") == 0
    assert read_manifest(tmp_path / "by-share").content["num_superwords"] == 38  # a tenth of 384 ids
    assert train("k-exaone", corpus, tmp_path / "by-size", "--transition-size", "350",
                 "--max-superword-words", "2") == 0
    manifest = read_manifest(tmp_path / "by-size")
    assert manifest.settings["transition_size"] == 350 and 0 < manifest.content["num_superwords"] <= 34
    vocab = json.loads((tmp_path / "by-size/tokenizer.json").read_text())["model"]["vocab"]
    assert max(token.strip("Ġ").count("Ġ") for token in vocab) == 1


def test_user_defined_split_rules(corpus: Path, tmp_path: Path) -> None:
    rules = {"digits": "triples", "normalization": "none", "special_tokens": {"<s>": 0, "</s>": 3},
             "num_special_ids": 4, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
             "chat_template": "", "max_token_bytes": 12}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    assert main(["train", "--preset", "custom", "--config", str(tmp_path / "rules.json"), "--vocab-size",
                 "300", "--input", str(corpus), "--output", str(tmp_path / "t")]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded.convert_ids_to_tokens([0, 1, 3, 4]) == ["<s>", "<|reserved_1|>", "</s>", "!"]
    assert len(loaded) == 300


def test_an_existing_one_is_replaced_only_on_request(corpus: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert train("solar-open", corpus, tmp_path / "t") == 0
    assert train("solar-open", corpus, tmp_path / "t") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train("k-exaone", corpus, tmp_path / "t", "--overwrite") == 0
    assert read_manifest(tmp_path / "t").content["preset"] == "k-exaone"
