"""IFBench's checks of words, sentences and counts (arXiv 2507.02833; allenai/IFBench, Apache-2.0), verdict by
verdict, oddities too: a benchmark's figures are compared with those of others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from megatron_sov.rewards.ifbench_texts import PUNCTUATION, bare, sentences, tokens, trimmed
from megatron_sov.rewards.instruction_checks import Check

VOWELS, CONSONANTS = frozenset("aeiou"), frozenset("bcdfghjklmnpqrstvwxyz")
PRIMES = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97}
CONJUNCTIONS = {"and", "but", "for", "nor", "or", "so", "yet"}
_NAMES = """Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia
    Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett
    Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria
    Joseph Claire Ryan Stella Jonathan"""
NAMES = _NAMES.split()
_PRONOUNS = """i me we us you he him she her it they them my mine our ours your yours his hers its
    their theirs myself ourselves yourself yourselves himself herself itself themselves this that these those
    who whom whose which what whoever whomever whatever whichever anybody anyone anything everybody everyone
    everything nobody nothing somebody someone something each either neither both all some any none"""
PRONOUNS = frozenset(_PRONOUNS.split())
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def word_count_range(response: str, min_words: int, max_words: int) -> bool:
    return min_words <= len(re.findall(r"\w+", response)) <= max_words


def unique_word_count(response: str, N: int) -> bool:
    return len({trimmed(word) for word in response.lower().split()}) >= N


def conjunctions(response: str, small_n: int) -> bool:
    # as they are written: "and" and "And" are two
    return len({word for word in response.split() if trimmed(word).lower() in CONJUNCTIONS}) >= small_n


def person_names(response: str, N: int) -> bool:
    return sum(re.search(rf"\b{name}\b", response) is not None for name in NAMES) >= N


def numbers(response: str, N: int) -> bool:
    return len(re.findall(r"\d+", bare(response))) == N


def punctuation(response: str) -> bool:
    if not any(mark in response for mark in ("!?", "?!", "‽")):
        return False
    rest = response.replace("?!", "", 1)
    if len(rest) == len(response):
        rest = response.replace("!?", "", 1)
    return all(mark in rest for mark in ".,!?;:")


def pronouns(response: str, N: int) -> bool:
    return sum(word in PRONOUNS for word in tokens(response.replace("/", " ").lower())) >= N


def words_japanese(response: str, N: int) -> bool:
    every = [trimmed(word) for word in response.split()][int(N) - 1::int(N)] if N > 0 else []
    return N > 0 and all(not word or word.isdigit() or _JAPANESE.search(word) for word in every)


def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str,
                      keyword5: str) -> bool:
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(response.lower().count(keyword.strip().lower()) == count for keyword, count in wanted)


def sentence_type(response: str) -> bool:
    found = Counter(sentence[-1] for sentence in sentences(response))
    return found["."] == 2 * found["?"]


def sentence_balance(response: str) -> bool:
    found = Counter(sentence[-1] for sentence in sentences(response))
    return found["."] == found["?"] == found["!"]


def overlap(response: str, reference_text: str, percentage: int) -> bool:
    def trigrams(text: str) -> set[str]:
        return {text[i:i + 3] for i in range(len(text) - 2)}

    mine = trigrams(response)
    share = 100 * (len(mine & trigrams(reference_text)) / len(mine)) if mine else -100.0
    return percentage - 2 <= share <= percentage + 2


def sentence_words(response: str) -> bool:
    found = sentences(response)
    return len(found) == 3 and len({len(sentence.strip()) for sentence in found}) == 1


def alphabet(response: str) -> bool:
    letters = [word[0].lower() for word in bare(response).split()]
    first = ord(letters[0]) - ord("a") if letters else -1
    return 0 <= first < 26 and all(letter == chr(ord("a") + (first + i) % 26)
                                   for i, letter in enumerate(letters))


def vowel(response: str) -> bool:
    text = response.strip()
    return "\n" not in text and len(VOWELS & set(text.lower())) <= 3


def consonants(response: str) -> bool:
    def clustered(word: str) -> bool:
        return any(a in CONSONANTS and b in CONSONANTS for a, b in pairwise(word))

    return all(map(clustered, response.lower().split()))


def alliteration_increment(response: str) -> bool:
    before = -1
    for sentence in sentences(response):
        firsts = [word[0] for word in (w.lstrip(PUNCTUATION + " ") for w in sentence.lower().split()) if word]
        same = [a == b for a, b in pairwise(firsts)]
        # the first pair of a sequence brings two words, each further one brings one
        count = sum(2 if not i or not same[i - 1] else 1 for i, equal in enumerate(same) if equal)
        if count <= before:
            return False
        before = count
    return True


def palindrome(response: str) -> bool:
    return sum(len(word) >= 5 and word == word[::-1] for word in bare(response).lower().split()) >= 10


def prime_lengths(response: str) -> bool:
    return all(len(word) in PRIMES for word in bare(response).split())


def repeats(response: str, small_n: int) -> bool:
    return max(Counter(bare(response.lower()).split()).values(), default=0) <= small_n


def keyword_in_sentence(response: str, word: str, N: int) -> bool:
    found = sentences(response)
    return 0 < N <= len(found) and re.search(rf"\b{re.escape(word)}\b", found[int(N) - 1],
                                             re.IGNORECASE) is not None


def last_first(response: str) -> bool:
    found = sentences(response)
    for one, following in pairwise(found):
        last, first = one.rstrip(PUNCTUATION + " ").split(), following.lstrip(PUNCTUATION + " ").split()
        # the first word keeps what stands behind it
        if not last or not first or last[-1].lower() != first[0].lower():
            return False
    return True


def paragraph_last_first(response: str) -> bool:
    paragraphs = [trimmed(line.strip().lower()).split() for line in response.split("\n")]
    return all(words[0] == words[-1] for words in paragraphs if words)


def increment(response: str, small_n: int) -> bool:
    counts = [len(bare(sentence).split()) for sentence in sentences(response)]
    return bool(counts) and all(b == a + small_n for a, b in pairwise(counts))


def no_consecutive(response: str) -> bool:
    words = bare(response.lower()).split()
    return all(a[0] != b[0] for a, b in pairwise(words))


def keywords_specific_position(response: str, keyword: str, n: int, m: int) -> bool:
    found = sentences(response)
    if not 0 < n <= len(found):
        return False
    words = [word for word in tokens(found[int(n) - 1]) if any(map(str.isalnum, word))]
    return 0 < m <= len(words) and words[int(m) - 1].lower() == keyword.strip().lower()


def words_position(response: str, keyword: str) -> bool:
    words = [word.lower() for word in tokens(response)]
    ends = bool(words) and words[-1] in PUNCTUATION
    return len(words) >= 2 + ends and words[1] == words[-2 - ends] == keyword.strip().lower()


WORD_CHECKS: Mapping[str, Check] = {
    "count:word_count_range": word_count_range, "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions, "count:person_names": person_names, "count:numbers": numbers,
    "count:punctuation": punctuation, "count:pronouns": pronouns, "count:words_japanese": words_japanese,
    "count:keywords_multiple": keywords_multiple,
    "ratio:sentence_type": sentence_type, "ratio:sentence_balance": sentence_balance,
    "ratio:overlap": overlap, "ratio:sentence_words": sentence_words,
    "words:alphabet": alphabet, "words:vowel": vowel, "words:consonants": consonants,
    "words:palindrome": palindrome, "words:prime_lengths": prime_lengths, "words:repeats": repeats,
    "words:last_first": last_first, "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive, "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
    "sentence:alliteration_increment": alliteration_increment, "sentence:keyword": keyword_in_sentence,
    "sentence:increment": increment,
}
"""Name of an instruction, as IFBench has it -> its check."""
NEEDS_MORE: Mapping[str, str] = {
    "ratio:stop_words": "NLTK's list of stop words", "words:start_verb": "NLTK's tagger of parts of speech",
    "words:odd_even_syllables": "syllapy's dictionary of syllables",
}
"""Name of an instruction that is not judged -> what it would need, a download each."""
