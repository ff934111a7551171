"""Patterns of tiktoken split text the same way in `tokenizers`, once translated (the module `regex` reads
them as they are)."""

from __future__ import annotations

import pytest
import regex
from tokenizers import Regex, pre_tokenizers

from tokenizer.formats.tiktoken_format import for_oniguruma

CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
          r"|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
O200K_PART = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{M}]*(?i:'s|'t)?|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+")
TEXTS = ["12 123 1234 1234567 a1",
         "it's  a TEST\n\n  end  \nof ", "  ", "a\n b\n", "price: 12,345.67!!\n\n", "한국어 123 [x{2}+]"]


def pieces(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", [CL100K, O200K_PART, r"(?:a(b)?){1,2}+|[\]{1,2}+$]+|.|\n",
                                     r"^\p{L}+|\s|.", r"x{2}+|\{2}+|[^x]|x"])
def test_translated_patterns_split_as_they_are_meant(pattern: str) -> None:
    for text in TEXTS:
        assert pieces(for_oniguruma(pattern), text) == [m.group() for m in regex.finditer(pattern, text)]


def test_untranslated_they_do_not() -> None:
    assert pieces(r"\p{N}{1,3}+", "1234567") == ["1234567"]
    assert pieces(for_oniguruma(r"\p{N}{1,3}+"), "1234567") == ["123", "456", "7"]
    assert pieces(r"\s+$|\s", "a  \nb") != pieces(for_oniguruma(r"\s+$|\s"), "a  \nb")


def test_what_means_the_same_stays_as_it_is() -> None:
    assert for_oniguruma(O200K_PART) == O200K_PART
    assert for_oniguruma(r"a{1,3}|b{2,}?|[a-z[0-9]{2}+$]|\$|\^") == r"a{1,3}|b{2,}?|[a-z[0-9]{2}+$]|\$|\^"
    assert for_oniguruma(r"(unclosed{1}+") == r"(unclose(?>d{1})"
