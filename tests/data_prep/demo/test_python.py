"""Docstrings, cleaning and questions."""

from __future__ import annotations

import textwrap

from data_prep.demo.python import (
    Docstring,
    clean,
    docstrings,
    documentation,
    question_and_answer,
    stdlib_files,
    topics,
)

SOURCE = '''
"""Module words."""
class A:
    """Class words."""
    def f(self):
        """Function words."""
        def inner():
            """Not documented from outside."""
'''


def test_docstrings_are_read_with_their_names() -> None:
    found = docstrings("pkg/mod.py", SOURCE)
    assert [(d.module, d.name, d.text) for d in found] == [
        ("pkg.mod", "", "Module words."), ("pkg.mod", "A", "Class words."),
        ("pkg.mod", "A.f", "Function words.")]
    assert docstrings("pkg/__init__.py", SOURCE)[0].module == "pkg"
    assert docstrings("bad.py", "def (") == []
    assert documentation(found) == {
        "pkg.mod": "pkg.mod\n\nModule words.\n\npkg.mod.A\n\nClass words.\n\npkg.mod.A.f\n\nFunction words."}


def test_markup_noise_goes_and_words_stay() -> None:
    text = textwrap.dedent("""\
        Title
        =====

        Use :func:`~os.walk` and ``x``::

        .. versionadded:: 3.1

        >>> 1 + 1
        2

        [![badge](u)](v)

        See :ref:`the guide <guide>`.""")
    assert clean(text) == "Title\n\nUse os.walk and `x`:\n\nSee the guide."


def test_questions_are_about_public_names_and_answers_are_sentences() -> None:
    text = "Remove any common leading whitespace\nfrom every line in text.\n\nMore."
    question, answer = question_and_answer(Docstring("textwrap", "dedent", text)) or ("", "")
    assert ("`textwrap.dedent`" in question
            and answer == "Remove any common leading whitespace from every line in text.")
    assert question_and_answer(Docstring("textwrap", "dedent", text)) == (question, answer)
    assert question_and_answer(Docstring("textwrap", "_private", text)) is None
    assert question_and_answer(Docstring("_collections", "f", text)) is None
    assert question_and_answer(Docstring("m", "f", "Too short.")) is None
    assert question_and_answer(Docstring("m", "f",
                                         "no capital letter stands at the beginning of this one.")) is None


def test_this_python_brings_text() -> None:
    names = [name for name, _ in stdlib_files()]
    assert "textwrap.py" in names and "json/decoder.py" in names and names == sorted(names)
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)
    assert "lambda" in topics()["topic lambda"]
