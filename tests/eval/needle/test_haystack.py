"""Text to hide needles in: of the right language, from the right split or file, without special tokens."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_sov.data.token_shards import Source, open_sources
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.text import Haystack, NeedleForm, detect_language, open_haystacks

PROSE = {
    "english": "It was a bright cold day in April, and the clocks were striking thirteen. (He said so.)\n",
    "korean": "대한민국은 민주공화국이다. 모든 권력은 국민으로부터 나온다. The end.\n",
    "thai": "ประเทศไทยเป็นราชอาณาจักรอันหนึ่งอันเดียว จะแบ่งแยกมิได้ Bangkok\n",
}


def test_text_goes_on_through_documents_and_leaves_special_tokens_out(
        form: NeedleForm, haystacks: dict[str, Haystack], token_shards: Path) -> None:
    stored = []
    for source in open_sources({str(token_shards): 1.0}, 1024):
        shard = source.shard("heldout")
        ids = np.concatenate([shard.tokens(i, 0, int(n)) for i, n in enumerate(shard.lengths)] * 2)
        assert set(form.special) & set(ids.tolist())
        stored.append(" ".join(map(str, ids[~np.isin(ids, form.special)])))
    found = [haystacks["heldout"].text(np.random.default_rng(seed), 400) for seed in range(12)]
    texts = [" ".join(map(str, ids)) for ids in found]
    assert all(len(ids) == 400 for ids in found)
    sources = {next(k for k, s in enumerate(stored) if text in s) for text in texts}
    assert sources == {0, 1} and len(set(texts)) == 12


def test_languages_are_seen_or_told(token_shards: Path) -> None:
    assert {name: detect_language(text) for name, text in PROSE.items()} == {name: name for name in PROSE}
    assert detect_language(inspect.getsource(inspect)) == "code"
    sources = open_sources({str(token_shards): 1.0}, 1024)
    tokenizer = token_shards / "tokenizer"
    told = open_haystacks(sources, "heldout", tokenizer, told={"second": "english"})
    assert [h.language for h in told] == ["english", "code"]
    assert [h.sizes for h in told] == [(sources[1].num_tokens["heldout"],),
                                       (sources[0].num_tokens["heldout"],)]
    (only,) = open_haystacks(sources, "heldout", tokenizer, languages=["code"], told={"second": "english"})
    assert only.language == "code"


def test_files_are_read_from_any_line_and_around_the_end(token_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_text("".join(f"{i}: {PROSE['thai']}" for i in range(40)), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    (haystack,) = open_haystacks([], "heldout", token_shards / "tokenizer", files=[("thai", file)])
    twice = file.read_text(encoding="utf-8") * 2
    starts = set()
    for seed in range(8):
        ids = haystack.text(np.random.default_rng(seed), 300)
        text = tokenizer.decode(ids.tolist()).rstrip("\ufffd")
        assert len(ids) == 300 and text in twice
        starts.add(text.split(":")[0])
    assert len(starts) > 4
    whole = len(tokenizer.encode(twice[:len(twice) // 2]).ids)
    assert len(haystack.text(np.random.default_rng(0), 3 * whole)) == 3 * whole


def test_mistakes_are_named(token_shards: Path, tmp_path: Path) -> None:
    tokenizer = token_shards / "tokenizer"
    sources = open_sources({str(token_shards): 1.0}, 1024)
    chats = Source("chats", token_shards, "chat", {}, {"heldout": 100}, 1.0)
    with pytest.raises(UserError, match="hold no 'heldout' text to hide needles in"):
        open_haystacks([chats], "heldout", tokenizer)
    with pytest.raises(UserError, match=r"no 'heldout' text is thai \(there is code\)"):
        open_haystacks(sources, "heldout", tokenizer, languages=["code", "thai"])
    with pytest.raises(UserError,
                       match=r"--language third=thai: the data has no such source .*sources: first, second"):
        open_haystacks(sources, "heldout", tokenizer, told={"third": "thai"})
    (tmp_path / "empty.txt").write_text(" \n \n")
    with pytest.raises(UserError, match=r"empty\.txt: starts with 4 characters that are no text"):
        open_haystacks([], "heldout", tokenizer, files=[("english", tmp_path / "empty.txt")])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read as UTF-8"):
        open_haystacks([], "heldout", tokenizer, files=[("english", tmp_path / "latin.txt")])
