"""`sov-data demo-corpus`: sources from this machine or from user files."""

import json
import textwrap
from pathlib import Path

import pytest

from data_prep import demo_corpus
from data_prep.cli import main
from data_prep.demo_corpus import (
    CorpusUnavailable, join_docstrings, parse_docstrings, select_documents, strip_markup)
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents import list_files, read_documents

SOURCE = '''
"""Module words."""
class A:
    """Class words."""
    def f(self):
        """Function words."""
        def inner():
            """Not documented from outside."""
'''


def test_parse_docstrings_returns_qualified_names() -> None:
    docstrings = parse_docstrings("pkg/mod.py", SOURCE)
    assert [(d.module, d.name, d.text) for d in docstrings] == [
        ("pkg.mod", "", "Module words."), ("pkg.mod", "A", "Class words."),
        ("pkg.mod", "A.f", "Function words.")]
    assert parse_docstrings("pkg/__init__.py", SOURCE)[0].module == "pkg"
    assert parse_docstrings("bad.py", "def (") == []
    assert join_docstrings(docstrings) == {
        "pkg.mod": "pkg.mod\n\nModule words.\n\npkg.mod.A\n\nClass words.\n\npkg.mod.A.f\n\nFunction words."}


def test_strip_markup_keeps_words() -> None:
    text = textwrap.dedent("""\
        Title
        =====

        Use :func:`~os.walk` and ``x``::

        .. versionadded:: 3.1

        >>> 1 + 1
        2

        [![badge](u)](v)

        See :ref:`the guide <guide>`.""")
    assert strip_markup(text) == "Title\n\nUse os.walk and `x`:\n\nSee the guide."


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a twentieth of the standard library and no packages; everything would take 15 s."""
    library = demo_corpus.list_stdlib_files()[::20]
    monkeypatch.setattr(demo_corpus, "list_stdlib_files", lambda: library)
    monkeypatch.setattr(demo_corpus, "list_package_files", list)
    monkeypatch.setattr(demo_corpus, "read_package_pages", dict)


def test_corpus_is_written_without_korean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    def unavailable() -> dict[str, str]:
        raise CorpusUnavailable("apt-get is not on this machine")

    monkeypatch.setattr(demo_corpus, "download_korean_pages", unavailable)
    assert main(["demo-corpus", "--output", str(tmp_path / "corpus")]) == 0
    assert "korean: left out, because apt-get is not on this machine" in capsys.readouterr().out
    content = read_manifest(tmp_path / "corpus", "corpus").content
    benchmark = "benchmarks/code-switching/test"
    assert sorted(content) == [benchmark, "chat", "code", "english", "judged"]
    lines = (tmp_path / f"corpus/{benchmark}.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert len(questions) == content.pop(benchmark)["num_documents"] > 10
    assert all(row["language"] == "en" and "`" in row["prompt"] for row in questions)
    rows = [json.loads(line) for line in (tmp_path / "corpus/judged.jsonl").read_text().splitlines()]
    assert len(rows) == content.pop("judged")["num_documents"] > 10
    assert all(len({r["content"] for r in row["responses"]}) == 2 for row in rows)
    for name, counts in content.items():
        documents = list(read_documents(list_files(tmp_path / "corpus" / f"{name}.jsonl")))
        assert len(documents) == counts["num_documents"] > 10
        assert all(bool(d.messages) == (name == "chat") for d in documents)
    code = [json.loads(line)["text"] for line in (tmp_path / "corpus/code.jsonl").read_text().splitlines()]
    assert any("import " in text for text in code) and len(set(code)) == len(code)


def test_korean_pages_become_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {f"page {i}": f"한국어 문서 {i}번입니다. " * 20 for i in range(12)} | {"short": "예"}
    monkeypatch.setattr(demo_corpus, "download_korean_pages", lambda: pages)
    assert main(["demo-corpus", "--output", str(tmp_path / "a")]) == 0
    assert main(["demo-corpus", "--output", str(tmp_path / "b")]) == 0
    assert read_manifest(tmp_path / "a").content["korean"]["num_documents"] == 12
    assert read_manifest(tmp_path / "a").files == read_manifest(tmp_path / "b").files


def test_user_text_replaces_gathered_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/book.txt").write_text("".join(f"Paragraph {i} of a book.\n\n" for i in range(4000)))
    (tmp_path / "mine/more.jsonl").write_text('{"text": "a line"}\n{"text": "a line"}\n{"text": "another"}\n')
    assert main(["demo-corpus", "--output", str(tmp_path / "out"), "--input", str(tmp_path / "mine")]) == 0
    assert sorted(read_manifest(tmp_path / "out").content) == [
        "benchmarks/code-switching/test", "chat", "judged", "user"]
    texts = [d.text for d in read_documents([tmp_path / "out/user.jsonl"])]
    assert "".join(texts[:-2]) == (tmp_path / "mine/book.txt").read_text()
    assert texts[-2:] == ["a line", "another"]
    assert len(texts) > 5
    assert main(["demo-corpus", "--output", str(tmp_path / "out2"), "--input", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out2").exists()


def test_selection_is_bounded_and_reproducible() -> None:
    texts = {f"{i:02d}": f"{i} " * 100 for i in range(50)} | {"twin": "7 " * 100, "short": "x"}
    chosen = select_documents(texts, 5000)
    assert sum(len(t) for t in chosen.values()) <= 5000
    assert len(chosen) >= 15  # a text has at most 300 characters
    assert chosen == select_documents(dict(reversed(texts.items())), 5000) and list(chosen) == sorted(chosen)
    # without a bound, all but the twin and the short text
    everything = select_documents(texts, 10**9)
    assert len(set(everything.values())) == len(everything) == 50
