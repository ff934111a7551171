"""A token manifest without a required part is refused with the name of the part."""

import copy
from typing import Any

import pytest

from megatron_sov.base.documents.shard_files import CONTENT_VERSION, build_source_record, check_token_manifest
from megatron_sov.base.errors import UserError

EMPTY = {"content_version": CONTENT_VERSION}
WHOLE: dict[str, Any] = EMPTY | {"tokenizer_sha256": "t", "vocab_size": 9, "sources": [
    {"name": "web", "format": "text", "splits": {"train": {
        "num_tokens": 1, "shards": [{"prefix": "web/train-00000"}]}}}]}


@pytest.mark.each(("place", "message"), [
    (("vocab_size",), "lacks vocab_size"), (("sources",), "lacks sources"),
    (("sources", 0, "format"), r"lacks sources\[0\]\.format"),
    (("sources", 0, "splits"), r"lacks sources\[0\]\.splits"),
    (("sources", 0, "splits", "train", "num_tokens"), r"lacks sources\[0\]\.splits\.train\.num_tokens")])
def test_every_missing_part_is_named(place: tuple[Any, ...], message: str) -> None:
    check_token_manifest("shards", WHOLE)
    content = copy.deepcopy(WHOLE)
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    del inside[place[-1]]
    with pytest.raises(UserError, match=f"shards: its manifest {message}"):
        check_token_manifest("shards", content)


@pytest.mark.each(("content", "message"), [
    (EMPTY, "lacks tokenizer_sha256, vocab_size, sources;"), (WHOLE | {"sources": 5}, "lacks sources;"),
    (WHOLE | {"sources": [5]}, r"lacks sources\[0\]\.name, "),
    (WHOLE | {"vocab_size": "9"}, "lacks vocab_size;"),
    (WHOLE | {"sources": [{"name": ["a"], "format": "text", "splits": []}]},
     r"lacks sources\[0\]\.name, sources\[0\]\.splits;"),
    (WHOLE | {"sources": [{"name": "a", "format": "text",
                           "splits": {"train": {"num_tokens": 1, "shards": []}}}]},
     r"lacks sources\[0\]\.splits\.train\.shards for 1 tokens;"),
    (WHOLE | {"sources": [{"name": "a", "format": "text",
                           "splits": {"train": {"num_tokens": 1, "shards": [7]}}}]},
     r"lacks sources\[0\]\.splits\.train\.shards\[0\]\.prefix;")])
def test_a_part_of_another_type_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"shards: its manifest {message}"):
        check_token_manifest("shards", content)


@pytest.mark.each("prefix", ["../other/train-00000", "/data/train-00000", "a/../../b", ""])
def test_a_shard_outside_of_the_folder_is_refused(prefix: str) -> None:
    content = copy.deepcopy(WHOLE)
    content["sources"][0]["splits"]["train"]["shards"] = [{"prefix": prefix}]
    with pytest.raises(UserError, match=f"its manifest names the shard '{prefix}', which is not inside"):
        check_token_manifest("shards", content)


# The record of a source that models have written.


def test_the_counts_of_a_split_are_those_of_its_shards() -> None:
    shards = [{"prefix": f"a/train-{i:05d}", "num_documents": i, "num_tokens": 10 * i, "num_bytes": 30 * i}
              for i in (1, 2)]
    record = build_source_record("a", "chat", {"loss": "float32"}, shards)
    splits = record["splits"]
    assert splits["train"] == {"shards": shards, "num_documents": 3, "num_tokens": 30, "num_bytes": 90}
    assert splits["heldout"] == {"shards": [], "num_documents": 0, "num_tokens": 0, "num_bytes": 0}
    assert (record["sidecars"], record["group_documents"], record["num_bad"]) == (["loss"], 1, {})
