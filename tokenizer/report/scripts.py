"""Writing that tokenizers treat badly: Hangul in its parts, Thai marks, emoji sequences,
and how dear each syllable is."""

from __future__ import annotations

import unicodedata
from collections import Counter

from megatron_sov.pages.page import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import Check, Verdict, cut
from tokenizer.report.measures import pieces

HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)
DEAR_DECOMPOSED = 2.0
"""Tokens of decomposed Korean over those of composed Korean, from which it is worth a remark."""
KOREAN = "한국어 문서를 읽고 쓰는 데에는 많은 낱말이 필요하다."

SAMPLES: dict[str, dict[str, str]] = {
    "Hangul": {
        "composed (NFC)": KOREAN, "decomposed (NFD)": unicodedata.normalize("NFD", KOREAN),
        "compatibility jamo": "ㅋㅋㅋ ㅎㅎ ㅠㅠ",
        "halfwidth jamo": "ﾤﾷﾱ", "old Hangul": "나랏말ᄊᆞ미 듕귁에 달아", "jamo alone": "ᄀ ᅡ ᆨ ᄀᅠ",
    },
    "Thai": {
        "tone and vowel marks": "กำลังที่นี้ ผู้ใหญ่ เก็บน้ำผึ้ง", "sara am in two parts": "นํ้า กํา",
        "marks out of order": "ก่ี ก้ิ", "mark without a letter": "่ ี", "digits": "๑๒๓๔๕๖",
    },
    "Emoji": {
        "joined family (ZWJ)": "👨\u200d👩\u200d👧\u200d👦", "flags": "🇰🇷🇹🇭🇯🇵", "skin tones": "👍🏻👍🏽👍🏿",
        "keycap": "1\ufe0f\u20e3 #\ufe0f\u20e3",
        "variation selectors": "❤\ufe0f ❤\ufe0e",
        "subdivision flag (tags)": "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "profession with skin tone": "👩🏽\u200d🔬 🏳\ufe0f\u200d🌈",
    },
    "Others": {
        "combining accents": "e\u0301 a\u0323\u0302 n\u0303", "Vietnamese": "Tiếng Việt",
        "Arabic marks": "العَرَبِيَّة", "Hebrew points": "שָׁלוֹם",
        "Devanagari": "क्षत्रिय हिन्दी", "direction marks": "a\u200eb\u200fc\u202ed\u202c",
        "zero width": "a\u200bb\u2060c\ufeffd", "ligature and width forms": "ﬁ Ａ Å ½ ㎏",
        "kana with marks": "か\u3099 がﾊﾟ",
        "rare Han": "𠮷野家 㐀 﨎", "mathematics": "𝒜𝟙 ∑∫√",
        "replacement and noncharacters": "\ufffd \ufffe \uffff", "controls": "\x00\x01\x1b\x7f\x85",
    },
}


def check_scripts(tokenizer: Opened) -> Check:
    """Encode and decode each sample; count the tokens of Hangul syllables and of decomposed Korean."""
    rows, found, lost, changed = [], {}, [], []
    for group, samples in SAMPLES.items():
        for name, text in samples.items():
            ids = tokenizer.encode(text)
            back = tokenizer.decode(ids)
            state = "same" if back == text else "equivalent" if _nfc(back) == _nfc(text) else "lost"
            lost += [f"{group}: {name}"] * (state == "lost")
            changed += [f"{group}: {name}"] * (state == "equivalent")
            found[f"{group}: {name}"] = {
                "text": text, "num_chars": len(text), "num_bytes": len(text.encode()), "num_tokens": len(ids),
                "num_tokens_nfc": len(tokenizer.encode(_nfc(text))), "back": state}
            rows.append([group, name, text, f"{len(text)}", f"{len(ids)}", state,
                         cut(pieces(tokenizer, text))])
    syllables = Counter(len(ids) for ids in tokenizer.encode_many([chr(c) for c in HANGUL_SYLLABLES]))
    decomposed, composed = (len(tokenizer.encode(SAMPLES["Hangul"][form]))
                            for form in ("decomposed (NFD)", "composed (NFC)"))
    ratio = decomposed / max(1, composed)
    dear = ratio > DEAR_DECOMPOSED
    verdict: Verdict = "bad" if lost else "note" if changed or dear else "good"
    summary = (f"{syllables[1]:,} of {len(HANGUL_SYLLABLES):,} Hangul syllables are one token; "
               f"decomposed Korean costs {ratio:.1f} times as much as composed"
               + (", so normalize the corpus to NFC" if dear else "")
               + (f"; {len(lost)} samples are lost: {', '.join(lost[:3])}" if lost
                  else "; all samples come back")
               + (f", {len(changed)} in an equivalent form" if changed else ""))
    numbers = {"hangul_syllables_by_tokens": {str(n): count for n, count in sorted(syllables.items())},
               "decomposed_over_composed": ratio, "samples": found, "lost": lost, "equivalent": changed}
    by_tokens = [[str(n), f"{c:,}"] for n, c in sorted(syllables.items())]
    tables = [Table(["tokens of a Hangul syllable", "syllables"], by_tokens),
              Table(["script", "sample", "text", "characters", "tokens", "comes back", "cut"], rows)]
    return Check("scripts", "Hangul, Thai, emoji and others", verdict, summary, numbers, tables)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
