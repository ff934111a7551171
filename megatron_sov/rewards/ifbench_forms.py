"""IFBench's checks of form, and of tasks that it poses itself (arXiv 2507.02833; allenai/IFBench,
Apache-2.0), verdict by verdict, oddities too."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from itertools import pairwise

from megatron_sov.rewards import patterns
from megatron_sov.rewards.ifbench_texts import PUNCTUATION, ascii_of, bare, sentences, tokens, trimmed
from megatron_sov.rewards.instruction_checks import Check
from megatron_sov.rewards.patterns import regex

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


def parentheses(response: str) -> bool:
    levels: list[str] = []
    deepest = 0
    for char in response:
        if char in "([{":
            levels.append(char)
            deepest = max(deepest, len(levels))
        elif char in ")]}":
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
            if deepest - len(levels) >= MIN_QUOTES:
                return True
        elif char in "\"'":
            levels.append(char)
            deepest = max(deepest, len(levels))
    return False


def options(response: str, options: str) -> bool:
    separator = "/" if "/" in options else "or" if "or" in options else ","
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
        places = [*text[-2:], *(texts[i + 1][:1] if i + 1 < len(texts) else "")] if text else []
        if not any(map(_EMOJI.fullmatch, places)):
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
