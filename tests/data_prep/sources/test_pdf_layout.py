"""From words on pages to text: columns, running heads, hyphens, tables, code, Korean and Japanese."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from data_prep.sources.pdf_layout import HYPHEN, Page, Vocabulary, Word, columns_of, joined, pages_text

SIZE = 10.0
LETTER = 5.0


def line(text: str, x: float, y: float, size: float = SIZE, fixed: bool = False) -> list[Word]:
    """Return words as a printer would set them; a tab is a wide gap."""
    words = []
    for cell in text.split("\t"):
        for word in cell.split():
            width = LETTER * len(word) * size / SIZE
            words.append(Word(word, x, y, x + width, y + size, size, fixed))
            x += width + LETTER * size / SIZE
        x += 40
    return words


def lines(texts: Iterable[str], x: float = 50, y: float = 100, step: float = 12) -> list[Word]:
    return [word for n, text in enumerate(texts) for word in line(text, x, y + step * n)]


def text_of(*pages: list[Word]) -> str:
    return pages_text([Page(words) for words in pages])


def test_lines_become_paragraphs() -> None:
    words = lines(["This is the first line of a paragraph", "and this the second one."]) + lines(
        ["Another paragraph stands further down", "and has two lines as well."], y=150)
    assert text_of(words) == ("This is the first line of a paragraph and this the second one.\n\n"
                              "Another paragraph stands further down and has two lines as well.")


LEFT = [f"left line {n} with some words" for n in range(6)]
RIGHT = [f"right line {n} with more words" for n in range(6)]


def test_columns_are_read_one_after_the_other_although_the_file_mixes_them() -> None:
    words = [word for pair in zip(lines(LEFT), lines(RIGHT, x=300), strict=True) for word in pair]
    assert text_of(words) == " ".join([*LEFT, *RIGHT])


def test_a_title_across_columns_ends_those_above_it() -> None:
    title = line("A title that goes across both of the columns of a page", 50, 190)
    words = (lines(LEFT) + lines(RIGHT, x=300) + title
             + lines([f"lower {text}" for text in LEFT], y=220) + lines(RIGHT, x=300, y=220))
    order = [text_of(block).partition(" ")[0] for block in columns_of(words)]
    assert order == ["left", "right", "A", "lower", "right"]


def test_a_table_is_no_column() -> None:
    rows = [f"name{n}\t{n * 11}\tyes" for n in range(6)]
    assert text_of(lines(rows)) == "\n".join(f"name{n} | {n * 11} | yes" for n in range(6))


def test_running_heads_and_page_numbers_go() -> None:
    bodies = [[f"{what} are the body of this page", f"and {what} stand in both of its lines."]
              for what in ("Apples", "Pears", "Plums", "Cherries", "Grapes")]
    pages = [line("The Book", 50, 20) + lines(body) + line(str(n + 7), 300, 780)
             for n, body in enumerate(bodies)]
    text = text_of(*pages)
    assert "The Book" not in text and text.count("are the body of this page and") == 5
    assert not any(piece.isdigit() and int(piece) in range(7, 12) for piece in text.split())
    assert "The Book" in pages_text([Page(words) for words in pages], keep_repeated=True)


def test_a_sentence_goes_on_over_a_page() -> None:
    first, second = lines(["A sentence that does not end on this"]), lines(["page but on the next one."])
    assert text_of(first, second) == "A sentence that does not end on this page but on the next one."


def test_a_table_of_contents_keeps_its_lines() -> None:
    words = lines(["1 Begin . . . . . . . . . . 1", "2 End . . . . . . . . . . . . 9"])
    assert text_of(words) == "1 Begin … 1\n2 End … 9"


def test_code_keeps_lines_and_indents() -> None:
    words = line("def f(x):", 50, 100, fixed=True) + line("return x", 50 + 4 * LETTER, 112, fixed=True)
    assert text_of(words) == "def f(x):\n    return x"


@pytest.mark.parametrize(("pieces", "known", "expected"), [
    (["an exam-", "ple of it"], "example", "an example of it"),
    (["a well-", "known fact"], "well-known", "a well-known fact"),
    (["state-", "of the art"], "state of state of", "state-of the art"),
    ([f"break{HYPHEN}", "able"], "", "breakable"),
    (["North-", "America"], "", "North-America"),
    (["日本語の文", "章です。"], "", "日本語の文章です。"),
    (["이 책은 학교", "에서 쓰는 책이다"], "", "이 책은 학교에서 쓰는 책이다"),
    (["이 책은 좋은", "책이다"], "", "이 책은 좋은 책이다"),
    (["프로그", "램을 쓴다"], "프로그램을", "프로그램을 쓴다"),
    (["one", "", "two"], "", "one two")])
def test_lines_are_joined_as_the_language_does(pieces: list[str], known: str, expected: str) -> None:
    assert joined(pieces, Vocabulary(known.split())) == expected


def test_no_page_is_no_text() -> None:
    assert text_of() == text_of([]) == ""
