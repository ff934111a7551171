"""Token ids and loss masks of texts, chats and preferences, compared with transformers and TRL."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data_prep.cli import main as sov_data
from data_prep.shards.encode import EncodedBatch, Encoder, EncodingSettings, FastBpe, load_fast_encoder
from data_prep.shards.foreign_tokenizer import fix_foreign_tokenizer
from megatron_sov.base.documents import (
    BadRecord, Conversation, Document, Message, RecordReading, read_documents)
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.marks import KIND_NONE
from tests.tokenizer.formats.test_export_command import leave_text_unmatched

CHAT = (("system", "Be kind."), ("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", "안녕"),
        ("assistant", "안녕하세요!"))


@pytest.fixture(scope="module", params=["solar-open", "k-exaone"])
def folder(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Path:
    return tokenizers[request.param]


@pytest.fixture(scope="module", params=[False, True], ids=["tokenizers", "tiktoken"])
def encoder(request: pytest.FixtureRequest, folder: Path) -> Encoder:
    return Encoder(folder, EncodingSettings(fast=request.param))


def encode_text(encoder: Encoder, text: str) -> np.ndarray:
    return encoder.encode_batch([Document("", text)]).ids


def get_token_types(batch: EncodedBatch) -> np.ndarray:
    return np.where(batch.kinds == KIND_NONE, TYPE_PROMPT, TYPE_RESPONSE)


def encode_chat(encoder: Encoder, messages: tuple[tuple[str, str], ...]) -> tuple[np.ndarray, np.ndarray]:
    batch = encoder.encode_batch([Document("", messages=Conversation.of(*messages).messages)])
    return batch.ids, get_token_types(batch)


def test_text_ids_equal_transformers(folder: Path, encoder: Encoder) -> None:
    text = "def f(x):\n    return  x # 한국어\n\n"
    ids = encode_text(encoder, text)
    assert ids.tolist() == [*AutoTokenizer.from_pretrained(folder).encode(text), encoder.eos_id]


def test_chat_ids_and_masks_equal_transformers(folder: Path, encoder: Encoder) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    ids, types = encode_chat(encoder, CHAT)
    theirs = loaded.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=True,
                                        return_dict=False)
    assert ids.tolist() == theirs + ([] if theirs[-1] == encoder.eos_id else [encoder.eos_id])
    end = "<|end|>" if "solar" in folder.name else "<|endofturn|>"
    responses = loaded.decode(ids[types == TYPE_RESPONSE], skip_special_tokens=False)
    assert responses == f"It is 4.{end}안녕하세요!{end}"
    assert set(types.tolist()) == {TYPE_PROMPT, TYPE_RESPONSE}
    assert (ids == encoder.eos_id)[-1] and (ids[-2] != encoder.eos_id)


@settings(max_examples=60)
@given(parts=st.lists(st.sampled_from(
    ["<|end|>", "<|endofturn|>", "[PAD]", "<|reserved_40|>", "<|begin|>", " ", "hi", "<|", "<think>"])))
def test_spelled_special_tokens_stay_text(encoder: Encoder, parts: list[str]) -> None:
    text = "".join(parts)
    ids = encode_text(encoder, text)
    assert (ids[:-1] >= 64).all() and ids[-1] == encoder.eos_id  # ids below 64 are special tokens
    plain, _ = encode_chat(encoder, (("user", "a"), ("assistant", "b")))
    hostile, types = encode_chat(encoder, (("user", text), ("assistant", text)))
    assert hostile[hostile < 64].tolist() == plain[plain < 64].tolist()
    assert (types == TYPE_RESPONSE).sum() == len(ids)  # the text, and the end of the turn instead of EOS


def test_batches_are_flat_columns(encoder: Encoder) -> None:
    texts = [f"text {i}" for i in range(50)]
    batch = encoder.encode_batch([Document("", t) for t in texts])
    alone = [encode_text(encoder, t).tolist() for t in texts]
    assert batch.lengths_tokens.tolist() == [len(ids) for ids in alone]
    assert batch.ids.tolist() == [id_ for ids in alone for id_ in ids] and len(batch.kinds) == 0


def test_begin_and_end_are_settings(folder: Path) -> None:
    both, none = Encoder(folder, EncodingSettings(bos="start")), Encoder(folder, EncodingSettings(eod="none"))
    ids = encode_text(none, "some text").tolist()
    assert encode_text(both, "some text").tolist() == [both.bos_id, *ids, both.eos_id]
    assert both.decode([both.bos_id or 0]) == AutoTokenizer.from_pretrained(folder).bos_token
    chat, types = encode_chat(both, CHAT)
    assert chat[0] == both.bos_id and types[0] == TYPE_PROMPT
    assert len(chat) == len(encode_chat(Encoder(folder), CHAT)[0]) + 1


def test_eos_is_learned_after_open_response(folder: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    file = bare / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"}))
    monkeypatch.setattr("data_prep.shards.encode.find_damaged_files", lambda path: [])
    encoder = Encoder(bare)
    ids, types = encode_chat(encoder, (("user", "hi"), ("assistant", "yes")))
    assert encoder.decode(ids[types == TYPE_RESPONSE].tolist()) == "yes" + encoder.decode([encoder.eos_id])
    ids, types = encode_chat(encoder, (("assistant", "yes"), ("user", "hi")))
    assert ids[-1] == encoder.eos_id and types[-1] == TYPE_PROMPT


def test_chat_without_learned_turn_is_rejected(encoder: Encoder) -> None:
    asked = Message("user", "What is 2+2?")
    for messages in ((asked,), (asked, Message("assistant", "4", is_learned=False))):
        with pytest.raises(BadRecord, match="is a chat of which nothing is learned"):
            encoder.encode_batch([Document("", messages=messages)])


def test_preference_is_two_sequences_with_equal_prompt(encoder: Encoder) -> None:
    prompt = CHAT[:2]
    pair = Document("", messages=Conversation.of(*prompt).messages,
                    chosen=(Message("assistant", "It is 4."),),
                    rejected=(Message("assistant", "5, I guess."),))
    batch = encoder.encode_batch([pair, pair])
    assert len(batch.lengths_tokens) == 4 and batch.lengths_tokens[0] == batch.lengths_tokens[2]
    for i, [response] in enumerate((pair.chosen, pair.rejected)):
        start = int(batch.lengths_tokens[:i].sum())
        part = slice(start, start + int(batch.lengths_tokens[i]))
        # the prompt has no assistant turn, so the pair's mask equals that of the chat
        ids, types = encode_chat(encoder, (*prompt, ("assistant", response.content)))
        assert np.array_equal(batch.ids[part], ids) and np.array_equal(get_token_types(batch)[part], types)


def test_assistant_turn_in_preference_prompt_is_not_learned(encoder: Encoder) -> None:
    pair = Document("", messages=Conversation.of(*CHAT[:4]).messages,
                    chosen=(Message("assistant", "안녕하세요!"),), rejected=(Message("assistant", "No."),))
    batch = encoder.encode_batch([pair])
    chosen = slice(0, int(batch.lengths_tokens[0]))
    learned = get_token_types(batch)[chosen] == TYPE_RESPONSE
    assert "It is 4." not in encoder.decode(batch.ids[chosen][learned].tolist())


def test_prompt_equals_generation_prompt_of_transformers(folder: Path, encoder: Encoder) -> None:
    prompt = Conversation.of(*CHAT[:2]).messages
    batch = encoder.encode_batch([Document("", messages=prompt, awaits_response=True)])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": r, "content": c} for r, c in CHAT[:2]], tokenize=True, return_dict=False,
        add_generation_prompt=True)
    assert batch.ids.tolist() == theirs and set(get_token_types(batch).tolist()) == {TYPE_PROMPT}


def test_changed_tokenizer_is_rejected(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|unk|>"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: has .* bytes, the manifest says"):
        Encoder(tmp_path)
    with pytest.raises(UserError, match="is not a 'tokenizer' artifact"):
        Encoder(tmp_path / "none")


@pytest.mark.each(("given", "imported", "output"), [
    ("hf", "hf", "hf-tokenizer"),
    ("packed", "packed/tokenizer", "packed-tokenizer"),  # token shards and checkpoints contain a tokenizer
    ("run", "run/checkpoints/step-10/tokenizer", "run-tokenizer"),  # newest step, not last by name
    ("hf/tokenizer.json", "hf/tokenizer.json", "tokenizer-tokenizer"),
    ("hf/config.json", "hf", "hf-tokenizer"),  # a file next to tokenizer.json means the folder
    ("old/my.tiktoken", "old/my.tiktoken", "my-tokenizer"),
    ("old", "old", "old-tokenizer"),
])
def test_foreign_tokenizer_is_rejected_with_import_command(given: str, imported: str, output: str,
                                                           folder: Path, cwd: Path) -> None:
    steps = [f"run/checkpoints/step-{step}/tokenizer" for step in (9, 10)]
    for name in ("hf", "packed/tokenizer", *steps):
        (cwd / name).mkdir(parents=True)
        shutil.copyfile(folder / "tokenizer.json", cwd / name / "tokenizer.json")
    (cwd / "old").mkdir()
    for name in ("old/my.tiktoken", "hf/config.json"):
        (cwd / name).touch()
    command = f"sov-tokenizer import {imported} --output {output}"
    with pytest.raises(UserError, match=f"run `{re.escape(command)}`, and pass"):
        Encoder(Path(given))
    fix = fix_foreign_tokenizer(Path(given))
    assert fix is not None and fix.before == (command,)
    with pytest.raises(UserError, match=r"no-1b: does not exist; .* `hf download no-1b`"):
        Encoder(Path("no-1b"))
    assert sov_data(["pack", "--tokenizer", given, "--input", ".", "--output", "o", "--dry-run"]) == 2


def test_prompt_and_completion_equal_trl(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    """TRL renders prompt and full chat, and learns all ids after the prompt with its generation prefix; here
    the last learned token is the end of the turn."""
    loaded = AutoTokenizer.from_pretrained(folder)
    first = [{"role": "user", "content": "2+2?"}]
    turns = [*first, {"role": "assistant", "content": "4"}, {"role": "user", "content": "안녕"}]
    answer = [{"role": "assistant", "content": "안녕하세요!"}]
    for prompt, completion in ((first, answer), (turns, answer), ("2+2?", "안녕하세요!")):
        (tmp_path / "a.json").write_text(json.dumps([{"prompt": prompt, "completion": completion}]))
        [document] = read_documents([tmp_path / "a.json"], RecordReading("chat"))
        batch = encoder.encode_batch([document])
        before = first if isinstance(prompt, str) else prompt
        begin = loaded.apply_chat_template(before, tokenize=True, return_dict=False,
                                           add_generation_prompt=True)
        whole = loaded.apply_chat_template(before + answer, tokenize=True, return_dict=False)
        learned = batch.kinds != KIND_NONE
        assert batch.ids[:len(whole)].tolist() == whole
        assert not learned[:len(begin)].any()
        learned_text = loaded.decode(batch.ids[learned])
        end = "<|end|>" if "solar" in folder.name else "<|endofturn|>"
        assert learned_text == answer[0]["content"] + end
        assert loaded.decode(whole[len(begin):]).rstrip("\n").endswith(learned_text)


def open_encoder_tokenizer(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


Pair = tuple[FastBpe, Tokenizer]


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    file = folder / "tokenizer.json"
    return FastBpe(file, open_encoder_tokenizer(file)), open_encoder_tokenizer(file)


def test_fast_encoder_equals_tokenizers_on_every_kind_of_character(pair: Pair) -> None:
    fast, tokenizer = pair
    planes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 17)]
    blocks = ["x".join(map(chr, planes[i : i + 4096])) for i in range(0, len(planes), 4096)]
    for block, encoding in zip(blocks, tokenizer.encode_batch_fast(blocks, add_special_tokens=False),
                               strict=True):
        assert fast.encode(block) == encoding.ids, f"from U+{ord(block[0]):04X}"


AWKWARD = "ab'sS 가\u1100\u1161\u0301\n\r\t1/\u3000\u017f<|end|>"


@settings(max_examples=150)
@given(text=st.one_of(st.text(max_size=80), st.text(alphabet=AWKWARD, max_size=80)))
def test_fast_encoder_equals_tokenizers_on_random_text(pair: Pair, text: str) -> None:
    fast, tokenizer = pair
    assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.tier1_cases(6)
@pytest.mark.parametrize("unit", [" ", "\n", " \n", "\u3000", "a", "가", "!"])
def test_fast_encoder_accepts_long_whitespace(pair: Pair, unit: str) -> None:
    fast, tokenizer = pair
    text = f"x{unit * (200_000 // len(unit))}y"
    assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def edit_tokenizer(source: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copy(source, target)
    raw = json.loads(target.read_text())
    edit(raw)
    target.write_text(json.dumps(raw))
    return target


def swap_merges(raw: dict[str, Any]) -> None:
    merges = raw["model"]["merges"]
    merges[0], merges[5] = merges[5], merges[0]


@pytest.mark.each(("edit", "reason"), [
    (swap_merges, "do not rise with its merges"),
    (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer is Lowercase"),
    (lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                                           "trim_offsets": True, "use_regex": True}),
     "not a split followed by bytes"),
    (lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
     "a regular expression that isolates"),
    (lambda raw: raw["added_tokens"][5].update(special=False), "is matched in ordinary text"),
    (lambda raw: raw["model"].update(dropout=0.1), "not plain byte-level BPE"),
    (lambda raw: raw["model"]["vocab"].update({"zqzqzq": 384}), "not 256 bytes and one token for each merge"),
    (leave_text_unmatched, "tiktoken differs on"),
])
def test_unsupported_tokenizer_is_not_fast(tokenizers: dict[str, Path], tmp_path: Path,
                                           edit: Callable[[dict[str, Any]], Any], reason: str) -> None:
    file = edit_tokenizer(tokenizers["solar-open"] / "tokenizer.json", tmp_path / "tokenizer.json", edit)
    fast, sentence = load_fast_encoder(file, open_encoder_tokenizer(file), ["some text"])
    assert fast is None and sentence.startswith("encoding with tokenizers, because") and reason in sentence


def test_supported_tokenizer_is_fast(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = open_encoder_tokenizer(file)
    # as in Llama's tokenizer; documents are encoded without it
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast, sentence = load_fast_encoder(file, tokenizer, ["some text", "한국어"])
    assert fast is not None and sentence.startswith("encoding with tiktoken: the same ids")
