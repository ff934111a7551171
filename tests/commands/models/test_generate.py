"""`megatron-sov generate`: the same text from every engine and number of processes, and events for the
report."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events
from tests.typed_words import format_set_options

PROMPT_OPTIONS = ["--prompt", "def parse(self", "--prompt", "The ", "--max-new-tokens", "9"]


def generate(read_output: Any, *arguments: str) -> list[dict]:
    return json.loads(read_output("generate", *arguments, "--json"))


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("layout", [["parallel.ep=2"], ["parallel.tp=2", "parallel.sp=true"]],
                         ids=["ep", "tp"])
def test_two_processes_sample_the_same_as_one(layout: list[str], one_rank: None, imported: dict[str, Path],
                                              run_checked: Any, read_output: Any) -> None:
    ask = [str(imported["solar_open"]), *PROMPT_OPTIONS, "--temperature", "0.8", "--top-p", "0.95",
           "--seed", "5"]
    settings = format_set_options(layout)
    two = run_checked("generate", *ask, "--json", "--nproc", "2", *settings)
    assert json.loads(two.stdout) == generate(read_output, *ask)


def test_prompts_come_from_a_file_and_texts_go_into_the_report(one_rank: None, imported: dict[str, Path],
                                                               tmp_path: Path, read_output: Any) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import", "target": "os"}\n\n{"prompt": "return"}\n')
    EventLog(tmp_path / EVENTS).close()
    output = read_output("generate", str(imported["solar_open"]), "--prompts",
                         str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "4", "--run", str(tmp_path))
    samples = list(read_events(tmp_path / EVENTS))
    assert [(s["event"], s["step"], s["prompt"], s["target"]) for s in samples] \
        == [("sample", 0, "import", "os"), ("sample", 0, "return", None)]
    assert all(s["prompt"] + s["text"] in output for s in samples)


def test_the_end_of_the_assistants_turn_ends_a_chat(one_rank: None, imported: dict[str, Path],
                                                    hf_models: dict[str, Path], read_output: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ["--prompt", "Hello", "--max-new-tokens", "6", "--chat"]
    (complete,) = generate(read_output, str(imported["solar_open"]), *ask)
    end = complete["tokens"][3]  # the fourth token serves as the end of the turn
    monkeypatch.setattr("megatron_sov.chat.encode.ChatEncoder.end_ids", lambda encoder: (end,))
    for folder in (imported["solar_open"], hf_models["solar_open"]):
        (continuation,) = generate(read_output, str(folder), *ask)
        assert continuation["tokens"] == complete["tokens"][:complete["tokens"].index(end) + 1]


def test_a_text_ends_a_continuation(one_rank: None, imported: dict[str, Path], hf_models: dict[str, Path],
                                    read_output: Any) -> None:
    plain = generate(read_output, str(imported["solar_open"]), *PROMPT_OPTIONS)
    part = plain[0]["text"][4:7]
    for folder in (imported["solar_open"], hf_models["solar_open"]):
        stopped = generate(read_output, str(folder), *PROMPT_OPTIONS, "--stop", part, "--batch-size", "1",
                           "--prefill-tokens", "2")
        assert [s["text"] for s in stopped] == [p["text"].split(part)[0] for p in plain]
        assert len(stopped[0]["tokens"]) < 9


@pytest.mark.parametrize("kind", ["checkpoint", "Hugging Face folder"])
def test_a_tokenizer_with_more_ids_than_its_model_is_refused(kind: str, imported: dict[str, Path],
                                                             hf_models: dict[str, Path], tmp_path: Path,
                                                             get_refusal: Any) -> None:
    target = shutil.copytree((imported if kind == "checkpoint" else hf_models)["solar_open"], tmp_path / "m")
    folder = target / "tokenizer" if kind == "checkpoint" else target
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 1024, "content": "<new>", "special": False, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert get_refusal("generate", str(target), "--prompt", "The <new>") == (
        f"error: {folder}: encodes a prompt with token id 1024, but the model has 1024 ids; replace it "
        "by the tokenizer of the model\n")


def test_more_tokens_than_the_context_of_a_hugging_face_folder_are_refused(
        hf_models: dict[str, Path], get_refusal: Any) -> None:
    limit = json.loads((hf_models["solar_open"] / "config.json").read_text())["max_position_embeddings"]
    assert f"the model has a context of {limit}; shorten one of them" in get_refusal(
        "generate", str(hf_models["solar_open"]), "--prompt", "a", "--max-new-tokens", str(limit))


ROW = '{"content": [{"type": "text", "text": "Draw one."}], "answer": "one"}'


@pytest.fixture
def work_folder(cwd: Path, hf_models: dict[str, Path]) -> Path:
    """Change to a folder with a model, a good and a bad file of rows, and a damaged picture."""
    Path("model").symlink_to(hf_models["solar_open"])
    Path("rows.jsonl").write_text(ROW)
    Path("bad.jsonl").write_text("{}")
    Path("a.png").write_bytes(b"no picture")
    return cwd


@pytest.mark.parametrize(("line", "message"), [
    ("generate run --image none.png", "none.png: is not a file"),
    ("generate run --prompt a --out-image drawn", "needs --image-decoder CODEC"),
    ("generate run --image a.png --engine vllm", "cannot enforce whole media blocks"),
    ("generate run --image a.png --max-audio-tokens -1", "--max-audio-tokens -1"),
    ("generate run --image a.png", "run: does not exist"),
    ("eval media model --data smell-text=rows.jsonl --media-root . --files f", "have the form PAIR=FILE"),
    ("eval media model --data text-image=bad.jsonl --media-root . --files f", "bad.jsonl:1: is not a valid"),
    ("eval media model --data text-image=rows.jsonl --media-root . --files f", "needs --image-judge"),
    ("eval media model --data text-image=rows.jsonl --media-root . --files f --image-judge 'a b'",
     "must have the form FILE.py:NAME"),
])
def test_a_bad_command_line_is_one_sentence(work_folder: Path, get_refusal: Any, line: str,
                                            message: str) -> None:
    assert message in get_refusal(*shlex.split(line))
    assert sorted(p.name for p in work_folder.iterdir()) == ["a.png", "bad.jsonl", "model", "rows.jsonl"]
