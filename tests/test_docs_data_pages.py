"""The pages about tokenizers and data: every command and snippet on them runs, in order."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest

import data_prep.cli
import tokenizer.cli
from data_prep import demo_corpus
from megatron_sov.base.artifacts import read_manifest

DOCS = Path(__file__).parents[1] / "docs"
MAINS = {"sov-tokenizer": tokenizer.cli.main, "sov-data": data_prep.cli.main}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"),
                      re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page, "sh") for line in block.splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_models: dict[str, Path]) -> Path:
    """A folder with the files that the pages name; gathering text from this machine is cut short."""
    texts = {"english": textwrap.TextWrapper.__doc__ or "", "code": inspect.getsource(textwrap),
             "korean": "한국어 문장. " * 9}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "my-texts").mkdir()
    shutil.copytree(hf_models["solar_open"], tmp_path / "my-model")
    (tmp_path / "heldout").mkdir()
    for name, text in texts.items():
        lines = [{"text": f"{i} {p}"} for i, p in enumerate(re.split(r"\n\n|(?<=\. )", text)) if p.strip()]
        (tmp_path / f"corpus/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / f"my-texts/{name}.txt").write_text(text)
        (tmp_path / f"heldout/{name}.jsonl").write_text(json.dumps({"text": text[::-1]}))
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in range(30)]
    (tmp_path / "corpus/chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "pairs.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "No idea."}) for i in range(30)))
    (tmp_path / "forum.jsonl").write_text("\n".join(
        json.dumps({"title": f"{i} + 1?", "body": "Please.", "reply": str(i + 1)}) for i in range(60)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i} + 1?", "answer": i + 1})
                                                      for i in range(30)))
    (tmp_path / "solutions.jsonl").write_text("\n".join(
        json.dumps({"query": f"{i} + 1?",
                    "solutions": [f"Count on from {i}.", {"thinking": "One more.", "answer": f"{i + 1}"}]})
        for i in range(30)))
    (tmp_path / "crawl.jsonl").write_text('{"text": "a good line"}\n{"text": "cut o')
    (tmp_path / "rules.json").write_text(blocks("tokenizer.md", "json")[0])
    library = demo_corpus.stdlib_files()[::40]
    monkeypatch.setattr(demo_corpus, "stdlib_files", lambda: library)
    monkeypatch.setattr(demo_corpus, "package_files", list)
    monkeypatch.setattr(demo_corpus, "readmes", dict)
    monkeypatch.setattr(demo_corpus, "korean_pages", lambda: {"page": "한국어 문장을 씁니다. " * 20})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.deep
def test_what_the_pages_show_runs(workplace: Path) -> None:
    shown = [command for page in ("tokenizer.md", "data.md") for command in commands(page)]
    assert len(shown) == 21
    for name, *arguments in shown:
        # megabytes of one letter, all of Unicode and every Hangul syllable take their time
        if arguments[0] == "report":
            arguments += [word for check in ("worst", "scalars", "reach", "scripts")
                          for word in ("--skip", check)]
        # the text here is too small for the page's vocabulary
        if arguments == ["demo-corpus", "--output", "corpus"]:
            shutil.rmtree("corpus")  # who reads this page first has none
        smaller = ["600" if a == "2048" else a for a in arguments]
        assert MAINS[name](smaller) == 0, (name, arguments)
    for snippet in blocks("tokenizer.md", "python"):
        exec(compile(snippet, "tokenizer.md", "exec"), {})
    assert [s["name"] for s in read_manifest("shards").content["sources"]] == ["english", "ko", "my-texts"]
    assert read_manifest("my-tokenizer").content["vocab_size"] == 512
