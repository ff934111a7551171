"""Prompts from the command line and from files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engine import ServerOptions
from megatron_sov.infer.prompts import ModelPrompt, read_prompts


def test_prompt_options_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "수도는", "target": "서울"}\n\n{"prompt": "b", "id": 7}\n', encoding="utf-8")
    assert read_prompts(["a"], file) == [ModelPrompt("a"), ModelPrompt("수도는", "서울"), ModelPrompt("b")]
    assert read_prompts(["a"], None) == [ModelPrompt("a")]


@pytest.mark.each(("line", "message"), [
    ("{", "is not valid JSON"),
    ("[" * 200_000, "is not valid JSON"),
    ('["a"]', 'must be an object with "prompt"'),
    ('{"text": "a"}', 'must be an object with "prompt"'),
    ('{"prompt": "a", "n": NaN}', "is not valid JSON"), ('{"prompt": "a", "n": 1e999}', "is not valid JSON"),
    (r'{"prompt": "a", "answer": "\ud800"}', "is not valid JSON"),
    ('{"prompt": "a", "target": 1}', 'must be an object with "prompt"'),
])
def test_malformed_line_is_reported_by_number(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=f"prompts.jsonl:2: {message}"):
        read_prompts([], file)


def test_missing_prompts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompts"):
        read_prompts([], None)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        read_prompts(["a", ""], None)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read"):
        read_prompts([], tmp_path / "nowhere.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"--prompts .*a\.jsonl: is empty"):
        read_prompts([], tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"UTF-8 at byte 2\)"):
        read_prompts([], tmp_path / "a.jsonl")


def test_prompts_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    file, text = tmp_path / "prompts.jsonl", "a\u2028b\u0085c\u2029d"
    file.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + '\r\n{"prompt": "e"}\n',
                    encoding="utf-8", newline="")
    assert read_prompts([], file) == [ModelPrompt(text), ModelPrompt("e")]


def test_invalid_address_is_reported_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--engine-url: must be an address"):
        ServerOptions(engine_url=("localhost:8000",)).places(tmp_path)


# Tokens that end a response: equal for a checkpoint and its export.

ENDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], bool]] = {
    # generation_config.json, changes of config.json, whether there is a chat template
    "trained here": (None, {}, True),
    "trained here, no template": (None, {}, False),
    "eos of config.json": (None, {"eos_token_id": 7}, True),
    "eos of config.json, no template": (None, {"eos_token_id": 7}, False),
    "several in config.json": (None, {"eos_token_id": [7, 9]}, True),
    "one in generation_config.json": ({"eos_token_id": 11}, {"eos_token_id": 7}, True),
    "several in generation_config.json": ({"eos_token_id": [11, 12]}, {"eos_token_id": 7}, True),
    "several, no template": ({"eos_token_id": [11, 12]}, {"eos_token_id": 7}, False),
    "generation_config.json without eos": ({"temperature": 0.6}, {"eos_token_id": 7}, True),
    "no eos at all": ({"temperature": 0.6}, {}, False),
}


@pytest.mark.tier1_cases(4)
@pytest.mark.parametrize("case", ENDS)
def test_checkpoint_and_its_export_stop_at_the_same_tokens(case: str, hf_models: dict[str, Path],
                                                           tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from megatron_sov import convert
    from megatron_sov.bench.lm.engine_runs import resolve_subject
    from megatron_sov.bench.lm.settings import LmEvalSettings
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.infer.prompts import PromptEncoder

    generation, changes, has_template = ENDS[case]
    source = shutil.copytree(hf_models["solar_open"], tmp_path / "source")
    (source / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    if not has_template:
        file = source / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["chat_template"]
        file.write_text(json.dumps(settings))
    convert.from_hf(source, tmp_path / "checkpoint")
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "export")
    targets = [find_target(tmp_path / name) for name in ("checkpoint", "export")]
    for chat in (False, True) if has_template else (False,):
        ours, exported = (PromptEncoder(target, chat).end_ids for target in targets)
        assert ours == exported
        if not chat:
            read = GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id if (
                tmp_path / "export/generation_config.json").is_file() else None
            reference = {AutoTokenizer.from_pretrained(tmp_path / "export").eos_token_id,
                         *(read if isinstance(read, list) else [read])}
            assert set(ours) == reference - {None}
        evaluation = LmEvalSettings(output=tmp_path / "out.json", chat_template=chat)
        judged = [resolve_subject(str(target.path), evaluation, with_hash=False).engine for target in targets]
        assert [running.end_ids for running in judged if running is not None] == [ours, ours]
