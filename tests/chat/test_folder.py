"""Chat forms as they lie on disk, in the spellings that folders have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_sov.chat.folder import open_tokenizer, read_chat_encoder
from megatron_sov.errors import UserError

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<x>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(("template", "config"), [
    (None, {"chat_template": TEMPLATE, "eos_token": "</s>"}),
    (None, {"chat_template": TEMPLATE, "eos_token": {"content": "</s>", "lstrip": False}}),
    (TEMPLATE, {"chat_template": "another one", "eos_token": "</s>"}),
    (None, {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
            "eos_token": "</s>"}),
])
def test_every_spelling_is_read(folder: Path, template: str | None, config: dict[str, object]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    encoder = read_chat_encoder(folder)
    assert encoder is not None and encoder.end_ids() == (256,)


def test_special_tokens_may_stand_in_a_file_of_their_own(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    encoder = read_chat_encoder(folder)
    assert encoder is not None and encoder.end_ids() == (256,)


def test_a_folder_without_chats_has_none_and_a_broken_one_is_named(folder: Path) -> None:
    assert read_chat_encoder(folder) is None
    for config in ("[" * 200_000, '{"chat_template": 5}', '{"chat_template": "{% for"}',
                   '{"chat_template": [5]}'):
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=r"its tokenizer cannot be read|its chat_template is"):
            read_chat_encoder(folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{}]}')
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer \(.*\); restore it"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert read_chat_encoder(folder) is None
