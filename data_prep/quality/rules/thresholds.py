"""The thresholds of all rules.  Defaults are those of the papers, which were written for English."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.settings import NotNegative, NotNegativeInt, Share

NgramWords = Annotated[int, Ge(1), Le(100)]


@dataclass(frozen=True)
class Thresholds:
    """What a document may be; None: the rule is off.

    Sources: Gopher (Rae et al., arXiv 2112.11446, section A1.1, table A1), C4 (Raffel et al., arXiv
    1910.10683, section 2.2, and its released code), FineWeb (Penedo et al., arXiv 2406.17557, section 3.6).
    """

    min_words: NotNegativeInt | None = 50
    """Gopher: words that are not signs alone, at least."""
    max_words: NotNegativeInt | None = 100_000
    """Gopher: such words, at most."""
    min_mean_word_chars: NotNegative | None = 3
    """Gopher: characters of such a word on average, at least."""
    max_mean_word_chars: NotNegative | None = 10
    """Gopher: characters of such a word on average, at most."""
    max_hashes_per_word: NotNegative | None = 0.1
    """Gopher: signs # per word, at most."""
    max_ellipses_per_word: NotNegative | None = 0.1
    """Gopher: ellipses per word, at most."""
    max_bullet_line_share: Share | None = 0.9
    """Gopher: of the lines, those that begin with a bullet."""
    max_ellipsis_line_share: Share | None = 0.3
    """Gopher: of the lines, those that end with an ellipsis."""
    min_alpha_word_share: Share | None = 0.8
    """Gopher: of the words, those with a letter, at least."""
    min_stop_words: NotNegativeInt | None = 2
    """Gopher: different stop words of the language that occur, at least."""

    max_duplicate_line_share: Share | None = 0.3
    """Gopher: of the lines, those that occurred before."""
    max_duplicate_paragraph_share: Share | None = 0.3
    """Gopher: of the paragraphs, those that occurred before."""
    max_duplicate_line_char_share: Share | None = 0.2
    """Gopher: of the characters, those in lines that occurred before."""
    max_duplicate_paragraph_char_share: Share | None = 0.2
    """Gopher: of the characters, those in paragraphs that occurred before."""
    max_top_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        2: 0.2, 3: 0.18, 4: 0.16})
    """Gopher: n -> of the characters, those in the most frequent n-gram of words."""
    max_duplicate_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})
    """Gopher: n -> of the characters, those in n-grams of words that occurred before."""

    lines_end_with_mark: bool = True
    """C4: lines that end without a terminal mark are taken out."""
    min_line_words: NotNegativeInt | None = 3
    """C4: lines with fewer words are taken out (as the paper and FineWeb have it; C4's own code, c4_utils.py,
    has 5)."""
    max_word_chars: NotNegativeInt | None = 1000
    """C4: lines with a longer word are taken out."""
    min_sentences: NotNegativeInt | None = 5
    """C4: sentences in the lines that stay, at least (as the paper and FineWeb have it; its code: 3)."""
    without_placeholder: bool = True
    """C4: no "lorem ipsum"."""
    without_curly_bracket: bool = True
    """C4: no sign {."""
    without_script_notes: bool = True
    """C4: lines with "javascript" are taken out."""
    without_policy_lines: bool = True
    """C4: lines about cookies, privacy and terms of use are taken out."""
    without_citation_marks: bool = True
    """C4: [1], [edit] and [citation needed] are taken out of lines."""

    min_terminal_line_share: Share | None = 0.12
    """FineWeb: of the lines, those that end with a terminal mark, at least."""
    max_short_line_share: Share | None = 0.67
    """FineWeb: of the lines, those of at most `short_line_chars` characters."""
    short_line_chars: NotNegativeInt = 30
    """FineWeb: what a short line is."""
    max_repeated_line_char_share: Share | None = 0.01
    """FineWeb: of the characters, those in lines that occurred before."""
    max_newlines_per_word: NotNegative | None = 0.3
    """FineWeb: line breaks per word, at most; more is a list."""
