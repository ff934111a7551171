"""Presets: special tokens at fixed ids, published split rules, and the chat formats of their models."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import regex
import yaml
from hypothesis import given, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from tokenizer.bpe.split_pattern import build_untrained_tokenizer
from tokenizer.presets import K_EXAONE, PRESETS, SOLAR_OPEN, Preset, load_preset


def test_published_ids() -> None:
    solar, exaone = SOLAR_OPEN.special_by_id(), K_EXAONE.special_by_id()
    assert solar.index(SOLAR_OPEN.bos_token) == 1
    assert solar.index(SOLAR_OPEN.eos_token) == solar.index(SOLAR_OPEN.pad_token) == 2
    assert [solar[i] for i in (20, 21, 22, 23, 24, 25, 30)] == [
        "<|begin|>", "<|end|>", "<|think|>", "<|content|>", "<|flush|>", "<|calls|>", "<|tool_calls|>"]
    assert exaone.index(K_EXAONE.pad_token) == 0 and exaone.index(K_EXAONE.bos_token) == 1
    assert exaone.index(K_EXAONE.eos_token) == 53
    assert solar[40] == "<|reserved_40|>"
    assert len(set(solar)) == len(set(exaone)) == SOLAR_OPEN.num_special_ids == 64


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
@given(text=st.text(alphabet=st.one_of(
    st.sampled_from("ab'sT 019 \n\r\t가나./,"), st.characters(codec="utf-8", max_codepoint=0x2FFF))))
def test_splits_are_those_of_the_pattern_in_another_regex_engine(preset: Preset, text: str) -> None:
    split = build_untrained_tokenizer(preset).pre_tokenizer.__getitem__(0)
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    assert pieces == [m.group() for m in regex.finditer(preset.final_pattern, text) if m.group()]


JINJA_EXTENSIONS = ("{% for m in messages %}{%- generation -%}{{ m.content|tojson }}{% endgeneration %}"
                    "{% break %}{% endfor %}")


def write_rules(folder: Path, **changes: object) -> Path:
    """Write the rules of Solar Open with changes."""
    (folder / "rules.json").write_text(json.dumps(asdict(SOLAR_OPEN) | changes))
    return folder / "rules.json"


@pytest.mark.each("change", [{"max_token_bytes": 16}, {"chat_template": JINJA_EXTENSIONS}])
def test_a_custom_preset_comes_from_a_file(tmp_path: Path, change: dict[str, Any]) -> None:
    assert load_preset("custom", write_rules(tmp_path, name="mine", **change)) == replace(
        SOLAR_OPEN, name="mine", **change)


@pytest.mark.each(("change", "codes"), [
    ({"special_tokens": {"<a>": 64}, "bos_token": "<a>", "eos_token": "<a>", "pad_token": "<a>"},
     [("rule", "special_tokens.<a>")]),
    ({"eos_token": "<none>"}, [("rule", "eos_token")]),
    ({"special_tokens": {**SOLAR_OPEN.special_tokens, "<x>": 1}}, [("twice", "special_tokens.<x>")]),
    ({"normalization": "NFKC"}, [("choice", "normalization")]),
    ({"colour": "red"}, [("unknown", "colour")]),
    ({"max_token_bytes": 0, "superword_share": 1.0},
     [("bound", "max_token_bytes"), ("bound", "superword_share")]),
    ({"superword_share": 0.2, "superword_pattern": ""}, [("rule", "superword_share")]),
    ({"max_superword_words": 1}, [("bound", "max_superword_words")]),
    ({"special_tokens": {**SOLAR_OPEN.special_tokens, "<|reserved_9|>": 10}},
     [("rule", "special_tokens.<|reserved_9|>")]),
    ({"special_tokens": {**SOLAR_OPEN.special_tokens, "": 10}}, [("bound", "special_tokens.")]),
    ({"digits": "single"}, [("rule", "digits")]),
    ({"chat_template": "a\n{% for m in %}"}, [("bound", "chat_template")]),
])
def test_bad_rules_are_named(tmp_path: Path, change: dict[str, object], codes: list[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError) as e:
        load_preset("custom", write_rules(tmp_path, **change))
    assert e.value.codes == codes


@pytest.mark.each(("name", "file", "content", "message"), [
    ("solar", "", "", "did you mean 'solar-open'"), ("custom", "", "", "needs --config"),
    ("solar-open", "rules.json", "", "belongs to --preset custom"),
    ("custom", "rules.json", "", "cannot be read"), ("custom", "rules.json", "{", "is not valid YAML"),
    ("custom", "rules.json", "[1]", "must be an object of settings"),
    ("custom", "rules.json", '{"special_tokens": {"<s>": 0, "</s>": 1, "<s>": 2}}',
     r"special_tokens.<s>.*twice"),
    ("custom", "rules.yaml", "special_tokens:\n  <s>: 0\n  <s>: 2\n", r"special_tokens.<s>.*twice"),
])
def test_presets_without_valid_rules_are_refused(name: str, file: str, content: str, message: str,
                                                 tmp_path: Path) -> None:
    if content:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_preset(name, tmp_path / file if file else None)


def test_yaml_is_read_as_json_is(tmp_path: Path) -> None:
    rules = {**asdict(K_EXAONE), "name": "mine"}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules, allow_unicode=True))
    assert load_preset("custom", tmp_path / "rules.yaml") == load_preset("custom", tmp_path / "rules.json")


@pytest.mark.each(("digits", "whitespace", "pieces"), [
    ("single", "runs", ["a", "  \n\n", " ", "1", "2", "3", "4", "5", "!"]),
    ("triples", "single", ["a", " ", " ", "\n", "\n", " ", "123", "45", "!"]),
    ("runs", "runs", ["a", "  \n\n", " ", "12345", "!"]),
])
def test_rules_for_digits_and_whitespace(tmp_path: Path, digits: str, whitespace: str,
                                         pieces: list[str]) -> None:
    rules = {k: v for k, v in asdict(SOLAR_OPEN).items() if k != "split_pattern"}
    (tmp_path / "rules.json").write_text(json.dumps({**rules, "digits": digits, "whitespace": whitespace}))
    preset = load_preset("custom", tmp_path / "rules.json")
    split = build_untrained_tokenizer(preset).pre_tokenizer.__getitem__(0)
    assert [piece for piece, _ in split.pre_tokenize_str("a  \n\n 12345!")] == pieces
    (tmp_path / "rules.json").write_text(json.dumps({**rules, "digits": "pairs"}))
    with pytest.raises(UserError, match=r"digits = .pairs. must be 'single', 'triples' or 'runs'"):
        load_preset("custom", tmp_path / "rules.json")
