"""Pages about tokenizers and data: every command, snippet and setting works, in order."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

import data_prep.cli
import tokenizer.cli
from data_prep import demo_corpus
from data_prep.curate.pipeline.step import STEPS, load_step_class
from data_prep.curate.scoring.labels import HIGHEST_LABELS
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.scoring.planted import plant_labels, write_lines
from tests.pages_typed import blocks, page_section, page_text, shell_lines

MAINS = {"sov-tokenizer": tokenizer.cli.main, "sov-data": data_prep.cli.main}


@pytest.fixture
def texts(cwd: Path, monkeypatch: pytest.MonkeyPatch, hf_models: dict[str, Path]) -> Path:
    """A folder with the files that the pages name; gathering text from this machine is cut short."""
    texts = {"english": textwrap.TextWrapper.__doc__ or "", "code": inspect.getsource(textwrap),
             "korean": "한국어 문장. " * 9}
    (cwd / "corpus").mkdir()
    (cwd / "my-texts").mkdir()
    shutil.copytree(hf_models["solar_open"], cwd / "my-model")
    (cwd / "heldout").mkdir()
    for name, text in texts.items():
        lines = [{"text": f"{i} {p}"} for i, p in enumerate(re.split(r"\n\n|(?<=\. )", text)) if p.strip()]
        (cwd / f"corpus/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (cwd / f"my-texts/{name}.txt").write_text(text)
        (cwd / f"heldout/{name}.jsonl").write_text(json.dumps({"text": text[::-1]}))
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in range(30)]
    (cwd / "corpus/chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (cwd / "pairs.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "No idea."}) for i in range(30)))
    (cwd / "forum.jsonl").write_text("\n".join(
        json.dumps({"title": f"{i} + 1?", "body": "Please.", "reply": str(i + 1)}) for i in range(60)))
    (cwd / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i} + 1?", "answer": i + 1})
                                                      for i in range(30)))
    (cwd / "solutions.jsonl").write_text("\n".join(
        json.dumps({"query": f"{i} + 1?",
                    "solutions": [f"Count on from {i}.", {"thinking": "One more.", "answer": f"{i + 1}"}]})
        for i in range(30)))
    (cwd / "crawl.jsonl").write_text('{"text": "a good line"}\n{"text": "cut o')
    (cwd / "rules.json").write_text(blocks(page_text("tokenizer.md"), "json")[0])
    library = demo_corpus.list_stdlib_files()[::40]
    monkeypatch.setattr(demo_corpus, "list_stdlib_files", lambda: library)
    monkeypatch.setattr(demo_corpus, "list_package_files", list)
    monkeypatch.setattr(demo_corpus, "read_package_pages", dict)
    monkeypatch.setattr(demo_corpus, "download_korean_pages", lambda: {"page": "한국어 문장을 씁니다. " * 20})
    return cwd


@pytest.mark.deep
def test_commands_of_tokenizer_and_data_pages_run(texts: Path) -> None:
    commands = [shlex.split(line) for page in ("tokenizer.md", "data.md")
                for line in shell_lines(page_text(page), "sh")]
    assert len(commands) == 20
    for name, *arguments in commands:
        if arguments[0] == "report":
            arguments += ["--skip", "scalars"]  # all of Unicode takes its time
        # the text here is too small for the page's vocabulary
        if arguments == ["demo-corpus", "--output", "corpus"]:
            shutil.rmtree("corpus")  # who reads this page first has none
        smaller = ["600" if a == "2048" else a for a in arguments]
        assert MAINS[name](smaller) == 0, (name, arguments)
    for snippet in blocks(page_text("tokenizer.md"), "python"):
        exec(compile(snippet, "tokenizer.md", "exec"), {})
    assert [s["name"] for s in read_manifest("shards").content["sources"]] == ["english", "ko", "my-texts"]
    assert read_manifest("my-tokenizer").content["vocab_size"] == 512


OWN = """import dataclasses

def shorter(document):
    return dataclasses.replace(document, text=document.text[:1000])
"""


@pytest.mark.deep
def test_the_pages_pipeline_runs(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_text("data_pipeline.md")
    (file,) = blocks(page, "yaml")
    Path("notes.yaml").write_text(file)
    Path("own.py").write_text(OWN)
    for name in ("web", "books"):
        Path("raw", name).mkdir(parents=True)
        for number in range(3):
            Path("raw", name, f"{number}.txt").write_text(
                f"The {name} say that {number} ships came in. They brought salt and timber. " * 20)
    Path("raw/web/.draft.txt").write_text("not yet")
    for line in shell_lines(page, "sh"):
        if "--cluster" not in line:
            assert data_prep.cli.main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "corpus: complete" in printed
    assert "\nsource web: raw/web: passed over 1 hidden (.draft.txt)\n" in printed
    for name in ("text", "summary.json", "quarantine/web.jsonl", "manifest.json",
                 "pipeline.json", "shards/books", "shared"):
        assert Path("corpus", name).exists(), name


def test_the_page_on_pipelines_names_every_step() -> None:
    assert [name for name in STEPS if f"`{name}`" not in page_text("data_pipeline.md")] == []


@pytest.mark.deep
def test_commands_of_the_scoring_page_run(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_section("data_quality.md", "Scores")
    parsed = json.loads(*blocks(page, "json"))
    assert 0 <= parsed["label"] <= HIGHEST_LABELS["regressor"]
    write_lines(cwd / "quality.jsonl", plant_labels("classifier", 120))
    write_lines(cwd / "education.jsonl", [parsed, *plant_labels("regressor", 120)])
    write_lines(cwd / "others.jsonl", plant_labels("regressor", 50, seed=3))
    for line in shell_lines(page, "sh"):
        program, *argv = shlex.split(line)
        assert program == "sov-data"
        assert data_prep.cli.main(argv) == 0, capsys.readouterr().err
    assert "education-model, a regressor" in capsys.readouterr().out
    for entry in yaml.safe_load(*blocks(page, "yaml"))["steps"]:
        ((kind, settings),) = entry.items()
        step = load_step_class(kind)
        made = step.Settings(**{k: Path(v) if k == "model" else v for k, v in settings.items()})
        assert find_all_problems(made) == [], kind
        step(made)


def test_the_page_on_scoring_lists_every_setting_of_every_step() -> None:
    for kind in ("quality", "education", "level", "kind"):
        assert kind in STEPS
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", page_section("data_quality.md", "Scores"), re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row.split("|")[3]))
        assert named == {field.name for field in dataclasses.fields(load_step_class(kind).Settings)}, kind


QUESTION = "How many barrels of oil does a refinery with twelve towers fill each morning?"


@pytest.fixture
def benchmarked(cwd: Path) -> Path:
    write_lines(cwd / "bench.jsonl", [{"id": 7, "question": QUESTION, "answer": "Twelve."}])
    write_lines(cwd / "chats.jsonl", [{"messages": [{"role": "user", "content": text},
                                                         {"role": "assistant", "content": "12"}]}
                                           for text in ("Hello!", QUESTION.upper())])
    write_lines(cwd / "prompts.jsonl", [{"prompt": text, "answer": 12}
                                             for text in (f"Say: {QUESTION}", "Go!")])
    return cwd


@pytest.mark.parametrize("heading", ["Duplicates", "Decontamination"])
def test_the_steps_that_the_page_shows_have_these_settings(benchmarked: Path, heading: str) -> None:
    for block in blocks(page_section("data_quality.md", heading), "yaml"):
        for step in yaml.safe_load(block)["steps"]:
            ((kind, settings),) = step.items()
            if "benchmarks" in settings:
                settings["benchmarks"] = tuple(map(Path, settings["benchmarks"]))
            assert find_all_problems(load_step_class(kind).Settings(**settings)) == []


def test_the_commands_that_the_page_shows_run(benchmarked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in blocks(page_section("data_quality.md", "Decontamination"), "sh")[0].splitlines():
        assert data_prep.cli.main(shlex.split(line)[1:]) == 0
    assert ("chats.jsonl: 2 records read: 1 written, 1 set aside (1 text of benchmarks)"
            in capsys.readouterr().out)
    text = (benchmarked / "clean-prompts/prompts.jsonl").read_text()
    assert text == '{"prompt": "Go!", "answer": 12}\n'
    (hit,) = json.loads((benchmarked / "clean-prompts/hits.json").read_text())
    assert (hit["item"], hit["before"], hit["found"]) == ("7", "Say: ", QUESTION[:-1])
    records = read_manifest("clean-chats", "corpus").content["records"]
    assert records == {"chats.jsonl": {"read": 2, "kept": 1, "left_out": 1}}
