"""Transformations of a benchmark text in which the step `decontaminate` must still find it."""

import re
import unicodedata
from collections.abc import Callable

WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def _break_lines(text: str) -> str:
    """Replace every second space by a line break, and hyphenate one long word."""
    count = iter(range(10_000))
    lines = re.sub(r" ", lambda _: "\r\n  " if next(count) % 2 else " ", text)
    return re.sub(r"([a-z]{4})([a-z]{4})", r"\1-\n\2", lines, count=1)


def _add_markup(text: str) -> str:
    """Surround words with tags, Markdown or TeX."""
    words = text.split(" ")
    marks = ("<b class='x'>{}</b>", "**{}**", "{}&nbsp;", "<br/>{}", "\\textbf{{{}}}")
    return " ".join(marks[i % 5].format(word) if i % 2 else word for i, word in enumerate(words))


THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}\b)")
DISGUISES: dict[str, Callable[[str], str]] = {
    "case": str.upper,
    "punctuation": lambda t: "“" + t.replace(" ", ", ").replace("?", "!") + "” ...",
    "full width": lambda t: t.translate(WIDE),
    "unicode forms": lambda t: unicodedata.normalize("NFD", t).replace("fi", "ﬁ").replace("fl", "ﬂ"),
    "line breaks": _break_lines,
    "inside a sentence": lambda t: f"As he asked me, {t} and went home; 그는 물었다",
    "markup": _add_markup,
    "zero width": lambda t: "\u200b".join(t).replace("e", "e\u00ad"),
    "thousands": lambda t: re.sub(r"\d(?=(\d{3})+\b)", lambda m: m[0] + ",", THOUSANDS_SEPARATOR.sub("", t)),
    "spacing": lambda t: re.sub(r"(?<=[가-힣ก-๛])\s+(?=[가-힣ก-๛])", "", t).replace(" ", " \t "),
}
"""Name -> function that disguises a text."""
ITEMS = {
    "english": "A refinery in Café Müller's office fills 12500 barrels each morning; how many barrels does "
               "it manufacture within 1000000 days?",
    "korean": "철수는 사과를 1500개 가지고 있었는데 영희에게 그 가운데 삼분의 일을 주고 나머지를 "
              "시장에서 팔았다. 철수가 판 사과는 모두 몇 개인가?",
    "thai": "สมชายมีส้มอยู่ในตะกร้าจำนวน 1500 ผล เขาแบ่งให้เพื่อนครึ่งหนึ่ง"
            "และนำส่วนที่เหลือไปขายที่ตลาด เขาจะขายส้มได้ทั้งหมดกี่ผล",
    "japanese": "太郎は市場で林檎を千五百個買い、その三分の一を友人に渡し、"
                "残りを別の町で売りました。太郎が売った林檎は全部で何個ですか。",
    "short": "Which refinery fills 12500 barrels?",
    "short korean": "다음 중 대한민국의 수도는 어디인가?",
}
"""Language -> evaluation item."""


def _change_words(change: Callable[[str], str]) -> Callable[[str], str]:
    """Return a function that changes each word of at least 4 letters."""
    return lambda text: re.sub(r"[A-Za-z]{4,}", lambda m: change(m[0]), text)


def _insert_in_words(left: str, right: str = "") -> Callable[[str], str]:
    return _change_words(lambda w: w[:2] + left + w[2:3] + right + w[3:])


def _surround_words(left: str, right: str) -> Callable[[str], str]:
    return _change_words(lambda w: left + w + right)


def _change_letters(change: Callable[[str], str], letters: str = "aeocp") -> Callable[[str], str]:
    return lambda text: re.sub(f"[{letters}]", lambda m: change(m[0]), text)


def _replace_lookalikes(table: str) -> Callable[[str], str]:
    pairs = dict(pair for pair in table.split())  # type: ignore[misc]
    return lambda text: "".join(pairs.get(c, c) for c in text)


MARKUP_DISGUISES: dict[str, Callable[[str], str]] = {
    **{f"tag {tag} in words": _insert_in_words(f"<{tag}>", f"</{tag.split()[0]}>") for tag in (
        "b", "i", "em", "strong", "span class='x'", "u", "mark", "font color=red", "a href='#x'", "sub",
        "code")},
    **{f"{name} in words": _insert_in_words(sign) for name, sign in {
        "wbr": "<wbr>", "comment": "<!-- x -->", "empty span": "<span></span>", "&shy;": "&shy;",
        "&zwnj;": "&zwnj;", "&#8203;": "&#8203;", "&#x200b;": "&#x200b;", "soft hyphen": "\u00ad",
        "word joiner": "\u2060", "grapheme joiner": "\u034f", "variation": "\ufe0f", "left mark": "\u200e",
        "byte order": "\ufeff", "TeX hyphen": r"\-", "TeX group": "{}", "TeX relax": r"\relax ",
        "quoted line end": "=\n",
        "script": "<script>x()</script>", "hangul filler": "\u3164"}.items()},
    **{f"{name} around words": _surround_words(left, right) for name, (left, right) in {
        "{\\tt": (r"{\tt ", "}"), "{\\bf": (r"{\bf ", "}"), "{\\it": (r"{\it ", "}"),
        "{\\large": (r"{\large ", "}"),
        "textbf": (r"\textbf{", "}"), "emph": (r"\emph{", "}"), "mbox": (r"\mbox{", "}"),
        "textcolor": (r"\textcolor{red}{", "}"), "color": (r"{\color{red} ", "}"),
        "mathrm": (r"$\mathrm{", "}$"), "underline": (r"\underline{", "}"),
        "operatorname": (r"\operatorname{", "}"), "braces": ("{", "}"),
        "ttfamily": (r"{\ttfamily ", "}"), "strong": ("**", "**"), "struck": ("~~", "~~"), "code": ("`", "`"),
        "link": ("[", "](https://a.example/x)"), "highlight": ("==", "=="),
        "underscores": ("_", "_")}.items()},
    **{f"{name} inside words": _insert_in_words(left, right) for name, (left, right) in {
        "textbf": (r"\textbf{", "}"), "{\\tt": (r"{\tt ", "}"), "asterisks": ("*", "*"),
        "strong": ("**", "**"), "code": ("`", "`"), "braces": ("{", "}")}.items()},
    "decimal entities": _change_letters(lambda c: f"&#{ord(c)};"),
    "hexadecimal entities": _change_letters(lambda c: f"&#x{ord(c):x};"),
    "entities twice": _change_letters(lambda c: f"&amp;#{ord(c)};"),
    "named entities": lambda t: t.replace(" ", "&nbsp;").replace("é", "&eacute;"),
    "entities of accents": _change_letters(lambda c: f"&{c}acute;", "aeo"),
    "escaped tags": _insert_in_words("&lt;b&gt;", "&lt;/b&gt;"),
    "percent": lambda t: t.replace(" ", "%20").replace("e", "%65"),
    "unicode escapes": _change_letters(lambda c: f"\\u{ord(c):04x}"),
    "byte escapes": _change_letters(lambda c: f"\\x{ord(c):02x}"),
    "quoted printable": _change_letters(lambda c: f"={ord(c):02X}"),
    "TeX accents": _change_letters(lambda c: f"\\'{{{c}}}", "aeo"),
    "TeX accents, short": _change_letters(lambda c: f"\\'{c}", "aeo"),
    "TeX blanks": lambda t: t.replace(" ", "~"),
    "TeX thin blanks": lambda t: t.replace(" ", r"\ "),
    "TeX lines": lambda t: t.replace(" ", r" \\ "),
    "accents": _change_letters(lambda c: unicodedata.normalize("NFC", c + "\u0301"), "aeo"),
    "marks over letters": _change_letters(lambda c: c + "\u0336\u0301\u0324", "aeo"),
    "Cyrillic": _replace_lookalikes("aа eе oо pр cс yу xх iі jј sѕ"),
    "Cyrillic capitals": lambda t: _replace_lookalikes("AА BВ EЕ KК MМ HН OО PР CС TТ XХ")(t.upper()),
    "Greek": _replace_lookalikes("oο vν aα iι uυ"),
    "small capitals": _replace_lookalikes("aᴀ eᴇ oᴏ tᴛ rʀ nɴ"),
    "Armenian": _replace_lookalikes("oօ uս hհ nո"),
    "mathematical bold": lambda t: "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in t),
    "circled": lambda t: "".join(chr(0x24D0 + ord(c) - 97) if "a" <= c <= "z" else c for c in t),
    "superscript": _replace_lookalikes("aᵃ eᵉ oᵒ nⁿ iⁱ"),
    "table cells": lambda t: "<tr><td>" + t.replace(" ", "</td><td>") + "</td></tr>",
    "line tags": lambda t: t.replace(" ", "<br/>"),
    "ruby": _change_words(lambda w: f"<ruby>{w}<rt>x</rt></ruby>"),
}
"""Name -> function that disguises a text with markup, escapes or lookalike letters."""
