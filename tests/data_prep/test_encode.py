"""Tokens and masks, compared with transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.encode import TYPE_PROMPT, TYPE_RESPONSE, Encoder
from data_prep.splits import HeldoutRule
from megatron_sov.documents import Document
from megatron_sov.errors import UserError

CHAT = (("system", "Be kind."), ("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", "안녕"),
        ("assistant", "안녕하세요!"))


@pytest.fixture(scope="module", params=["solar-open", "k-exaone"])
def folder(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Path:
    return tokenizers[request.param]


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def test_text_is_transformers_ids_and_eos(folder: Path, encoder: Encoder) -> None:
    text = "def f(x):\n    return  x # 한국어\n\n"
    [ids] = encoder.encode_text([Document("", text)])
    assert ids.tolist() == [*AutoTokenizer.from_pretrained(folder).encode(text), encoder.eos_id]


def test_chat_is_transformers_rendering_with_masks(folder: Path, encoder: Encoder) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    ids, types = encoder.encode_chat(Document("", messages=CHAT))
    theirs = loaded.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=True, return_dict=False)
    assert ids.tolist() == theirs + ([] if theirs[-1] == encoder.eos_id else [encoder.eos_id])
    end = "<|end|>" if "solar" in folder.name else "<|endofturn|>"
    responses = loaded.decode(ids[types == TYPE_RESPONSE], skip_special_tokens=False)
    assert responses == f"It is 4.{end}안녕하세요!{end}"
    assert set(types.tolist()) == {TYPE_PROMPT, TYPE_RESPONSE}
    assert (ids == encoder.eos_id)[-1] and (ids[-2] != encoder.eos_id)


@settings(max_examples=60)
@given(parts=st.lists(st.sampled_from(
    ["<|end|>", "<|endofturn|>", "[PAD]", "<|reserved_40|>", "<|begin|>", " ", "hi", "<|", "<think>"])))
def test_no_text_reaches_a_special_id(encoder: Encoder, parts: list[str]) -> None:
    text = "".join(parts)
    [ids] = encoder.encode_text([Document("", text)])
    assert (ids[:-1] >= 64).all() and ids[-1] == encoder.eos_id
    plain, _ = encoder.encode_chat(Document("", messages=(("user", "a"), ("assistant", "b"))))
    hostile, types = encoder.encode_chat(Document("", messages=(("user", text), ("assistant", text))))
    assert hostile[hostile < 64].tolist() == plain[plain < 64].tolist()
    assert (types == TYPE_RESPONSE).sum() == len(ids)  # the same text, and its end token in the place of EOS


def test_batches_are_flat_columns_by_split(encoder: Encoder) -> None:
    documents = [Document("", f"text {i}") for i in range(50)]
    rule = HeldoutRule(0.2)
    result = encoder.encode_batch(documents, rule)
    assert set(result) == {"train", "heldout"}
    assert sum(len(b.lengths_tokens) for b in result.values()) == 50
    assert sum(b.num_bytes for b in result.values()) == sum(len(d.text) for d in documents)
    for batch in result.values():
        assert list(batch.columns) == ["bin"] and batch.lengths_tokens.sum() == len(batch.columns["bin"])
    chat = encoder.encode_batch([Document("", messages=CHAT)], HeldoutRule(0.0))["train"]
    assert np.array_equal(chat.columns["loss"], (chat.columns["type"] == TYPE_RESPONSE).astype(np.float32))


def test_a_changed_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|unk|>"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: has .* bytes, the manifest says"):
        Encoder(tmp_path)
    with pytest.raises(UserError, match="is not a 'tokenizer' artifact"):
        Encoder(tmp_path / "none")
