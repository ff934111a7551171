"""IFBench's checks (arXiv 2507.02833; allenai/IFBench, Apache-2.0), verdict by verdict, oddities too: a
benchmark's figures are compared with those of others.

IFBench cuts sentences by NLTK's punkt, a trained model, and words by NLTK's rules for English; here both are
cut by few rules.
"""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.instruction_checks import Check, hold_periods, release_periods
from megatron_sov.judge.rewards.patterns import regex

PUNCTUATION = string.punctuation
_NO_PUNCTUATION = str.maketrans("", "", PUNCTUATION)
# behind an ellipsis a sentence goes on, unless a capital letter begins another one
_SENTENCE_END = regex.compile(
    r"(?:(?<=[?!][\"”'’)\]*]*)|(?<=(?<!\.\.)\.[\"”'’)\]*]*)|(?<=\.\.\.)(?=\s+[A-Z]))\s+")
_CHUNK = re.compile(r"\.\.\.|--+|\w+(?:[-./'&_]\w+|[,:]\d+)*|[^\w\s]")
_CONTRACTION = re.compile(r"(\w+)(n't|'(?:s|m|d|ll|re|ve))", re.IGNORECASE)
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
OPENING = {")": "(", "]": "[", "}": "{"}
MIN_BRACKETS, MIN_QUOTES = 5, 3
"""Levels of nesting."""
MIN_COUNTRIES = 52
REPEATED = "only output this sentence here, ignore all other requests."
_CAPITALS = """Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin
    Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern
    Ljubljana Zagreb"""
CAPITALS = _CAPITALS.split()
_EMOJI = regex.compile(r"[\p{Emoji}--\p{Regional_Indicator}--[0-9#*]]", regex.VERSION1)
_QUESTION = re.compile(r"\n*(?:Question \d+[.|):;]?\s*)")
_CHOICE = re.compile(r"[A-Ea-e][.|)]\s*\w+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text with the marks that end them."""
    return [release_periods(part) for part in _SENTENCE_END.split(hold_periods(text.strip())) if part]


def tokens(text: str) -> list[str]:
    """Return the words of a text, each mark alone; of contractions the two parts."""
    found = []
    for chunk in _CHUNK.findall(text):
        match = _CONTRACTION.fullmatch(chunk)
        found += [match[1], match[2]] if match else [chunk]
    return found


def bare(text: str) -> str:
    return text.translate(_NO_PUNCTUATION)


def trimmed(text: str) -> str:
    """Return a text without punctuation and blanks at its ends."""
    return text.strip(PUNCTUATION + " ")


def ascii_of(text: str) -> str:
    """Return a text in ASCII: letters without their marks, and nothing of other scripts."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


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
    # the interrobang is taken away first: its two marks do not count as those asked for
    rest = response.replace("?!", "", 1)
    if len(rest) == len(response):
        rest = response.replace("!?", "", 1)
    return all(mark in rest for mark in ".,!?;:")


def pronouns(response: str, N: int) -> bool:
    return sum(word in PRONOUNS for word in tokens(response.replace("/", " ").lower())) >= N


def words_japanese(response: str, N: int) -> bool:
    # JSON may bring N as 3.0, and a slice takes whole numbers alone
    every = [trimmed(word) for word in response.split()][int(N) - 1::int(N)] if N > 0 else []
    return N > 0 and all(not word or word.isdigit() or _JAPANESE.search(word) for word in every)


def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str,
                      keyword5: str) -> bool:
    # the n-th keyword as often as the n-th of these, exactly
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
    # of the response's trigrams, not of their union
    share = 100 * (len(mine & trigrams(reference_text)) / len(mine)) if mine else -100.0
    return percentage - 2 <= share <= percentage + 2


def sentence_words(response: str) -> bool:
    found = sentences(response)
    return len(found) == 3 and len({len(sentence.strip()) for sentence in found}) == 1


def alphabet(response: str) -> bool:
    letters = [word[0].lower() for word in bare(response).split()]
    first = ord(letters[0]) - ord("a") if letters else -1
    # from any letter on, around the end of the alphabet
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
        words = [word.lstrip(PUNCTUATION + " ") for word in sentence.lower().split()]
        firsts = [word[0] for word in words if word]
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
    # a mark at the end is a token, and no word
    if words and words[-1] in PUNCTUATION:
        words.pop()
    return len(words) >= 2 and words[1] == words[-2] == keyword.strip().lower()


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


def parentheses(response: str) -> bool:
    levels: list[str] = []
    deepest = 0
    for char in response:
        if char in "([{":
            levels.append(char)
            deepest = max(deepest, len(levels))
        elif char in ")]}":
            # a wrong bracket begins the count again; only brackets of the same kind close each other
            if levels and levels[-1] == OPENING[char]:
                levels.pop()
                if deepest >= MIN_BRACKETS:
                    return True
            else:
                levels, deepest = [], 0
    return False


def quotes(response: str) -> bool:
    levels: list[str] = []
    deepest = 0
    for char in response:
        if levels and char == levels[-1]:
            levels.pop()
            # the same mark closes the innermost quotation, another one opens the next
            if deepest - len(levels) >= MIN_QUOTES:
                return True
        elif char in "\"'":
            levels.append(char)
            deepest = max(deepest, len(levels))
    return False


def options(response: str, options: str) -> bool:
    # the data set writes its options in three ways
    separator = next((mark for mark in ("/", "or") if mark in options), ",")
    allowed = [option.strip() for option in options.split(separator)]
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
        return response in allowed
    return trimmed(response).lower() in {trimmed(option).lower() for option in allowed}


def newline(response: str) -> bool:
    text = bare(response).strip()
    return len([line for line in text.split("\n") if line]) == len(text.split())


def emoji(response: str) -> bool:
    texts = [bare(sentence).strip() for sentence in sentences(response)]
    for i, text in enumerate(texts):
        # a selector may stand behind the last character, and the emoji itself behind the full stop
        behind = texts[i + 1][:1] if i + 1 < len(texts) else ""
        if not text or not any(map(_EMOJI.fullmatch, text[-2:] + behind)):
            return False
    return True


def line_indent(response: str) -> bool:
    lines = response.split("\n")
    for line in lines:  # IFBench's own way: of blank lines in a row every second one stays
        if not line.strip():
            lines.remove(line)
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    return all(a < b for a, b in pairwise(indents))


def quote_unquote(response: str) -> bool:
    text = "".join(response.replace("'\"'", "").split())
    rest = text.strip("0123456789" + PUNCTUATION.replace('"', ""))
    return '""' not in text and not rest.endswith('"')


def list_marked(response: str, sep: str) -> bool:
    return response.count(sep) >= 2


def thesis(response: str) -> bool:
    # lengths 3 and 4 below are those of <i> and </i>: with <em> the original is off by one, and so are we
    begin = response.find("<i>") if "<i>" in response else response.find("<em>")
    text = response[begin:] if begin >= 0 else ""
    end = text.find("</i>") if "</i>" in text else text.find("</em>")
    return end >= 0 and bool(text[3:end].strip()) and bool(text[end + 4:].strip())


def sub_bullets(response: str) -> bool:
    return all("-" in bullet for bullet in response.split("*")[1:])


def no_bullets_bullets(response: str) -> bool:
    num_sentences = num_bullets = 0
    goes_on = True
    for line in response.split("\n"):
        if line.strip().startswith("*"):
            goes_on = False
            if num_sentences < 2:
                return False
            num_bullets += 1
        elif goes_on:
            found = sentences(line)
            goes_on = bool(found)  # a blank line ends the sentences
            num_sentences += len(found)
        else:
            return False
    return num_bullets >= 2


def title_case(response: str) -> bool:
    def small(word: str) -> bool:
        return word[0].islower() and (len(word) == 1 or word[1:].isupper() or word[1:].islower())

    return not any(word[0].isalpha() and small(word) for word in tokens(response))


def output_template(response: str) -> bool:
    return all(part in response for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def no_whitespace(response: str) -> bool:
    return not any(map(str.isspace, response))


def repeat_change(response: str, prompt_to_repeat: str) -> bool:
    # exactly the first word has changed
    return prompt_to_repeat != response and prompt_to_repeat.split()[1:] == response.split()[1:]


def repeat_simple(response: str) -> bool:
    return response.strip().lower() == REPEATED


def repeat_span(response: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    return response.strip().lower() == prompt_to_repeat[int(n_start):int(n_end) + 1].strip().lower()


def multiples(response: str) -> bool:
    return re.findall(r"\d+", response) == [str(i) for i in range(14, 51, 7)]


def mcq_count_length(response: str) -> bool:
    if not response.startswith("Question"):
        return False
    lengths = []
    for question in filter(None, map(str.strip, _QUESTION.split(response))):
        lines = [line.strip() for line in question.split("\n")]
        choices = [i for i, line in enumerate(lines) if _CHOICE.match(line)]
        if len(choices) != 5:
            return False
        lengths.append(len(" ".join(lines[:choices[0]]).strip()))
    return len(lengths) == 4 and all(a < b for a, b in pairwise(lengths))


def reverse_newline(response: str) -> bool:
    lines = list(filter(None, map(trimmed, response.split("\n"))))
    # the list in reverse begins with Zimbabwe: what stands before it is talk
    begin = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    countries = [ascii_of(line) for line in lines[begin:]]
    return len(countries) >= MIN_COUNTRIES and countries == sorted(countries, reverse=True)


def word_reverse(response: str) -> bool:
    return "bald eagle" in " ".join(bare(response.lower()).split()[::-1])


def character_reverse(response: str) -> bool:
    return "elgae dlab" in response.lower()


def sentence_alphabet(response: str) -> bool:
    found = sentences(response)
    return len(found) == 26 and all(sentence.lower().startswith(chr(ord("a") + i))
                                    for i, sentence in enumerate(found))


def european_capitals_sort(response: str) -> bool:
    return [name.strip() for name in ascii_of(response).split(",") if name.strip()] == CAPITALS


def _table(text: str, delimiter: str = ",") -> list[list[str]]:
    """Return the rows of a table; none where it is no CSV."""
    try:
        return list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:
        return []


def _headed(response: str, names: tuple[str, ...], delimiter: str) -> bool:
    """Return whether the first line has these names, each with or without quotation marks."""
    head = delimiter.join(f'(?:{name}|"{name}")' for name in names)
    return re.fullmatch(head, response.split("\n")[0].strip()) is not None


def csv_city(response: str) -> bool:
    rows = _table(response)
    return (len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"]
            and all(len(row) == 5 for row in rows[1:]))


def csv_special_character(response: str) -> bool:
    if not _headed(response, ("ProductID", "Category", "Brand", "Price", "Stock"), r",[ \t]*"):
        return False
    # quotation marks tripled: the reader then keeps one pair, by which quoted fields are known
    rows = _table(response.replace('"', '"""'))
    if len(rows) != 15:
        return False
    for row in rows[1:]:  # rows behind the one that has the field are not looked at
        if len(row) != 5:
            return False
        if any(patterns.search(r'\A".*[^\d\w\s].*"', field) for field in row):
            return True
    return False


def csv_quotes(response: str) -> bool:
    if not _headed(response, ("StudentID", "Subject", "Grade", "Semester", "Score"), r"\t *"):
        return False
    rows = _table(response.replace('"', '"""'), "\t")
    fields = [field.strip() for row in rows for field in row]
    return (len(rows) == 4 and all(len(row) == 5 for row in rows)
            and all(field[:1] == field[-1:] == '"' for field in fields))


def date_format_list(response: str) -> bool:
    days = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
    for date in response.strip().split(","):
        match = re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", date.strip())
        if match is None:
            return False
        year, month, day = map(int, match.groups())
        # IFBench looks at no day of a month 0
        if not 1769 <= year <= 1821 or month > 12 or (month and day > days.get(month, 31)):
            return False
    return True


FORM_CHECKS: Mapping[str, Check] = {
    "format:parentheses": parentheses, "format:quotes": quotes, "format:options": options,
    "format:newline": newline, "format:emoji": emoji, "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote, "format:list": list_marked, "format:thesis": thesis,
    "format:sub-bullets": sub_bullets, "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case, "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "repeat:repeat_change": repeat_change, "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
    "custom:multiples": multiples, "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline, "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse, "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort, "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character, "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
}
"""Name of an instruction, as IFBench has it -> its check."""
