"""`sov-data pack` with a media corpus: media tokens, placeholders and features."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.cli import main
from data_prep.shards.token_artifact import open_split
from data_prep.shards.verify import verify_shards
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.shard_files import FEATURES, NO_FEATURE
from megatron_sov.chat.media_tokens import AUDIO_PAD, IMAGE_PAD, VIDEO_PAD
from megatron_sov.model.modality import MediaEncoding
from megatron_sov.omni.media.banks import open_bank, read_bank_shapes
from megatron_sov.omni.media.items import MediaVocabulary
from tests.data_prep.media.chats import Encode, build_media_chat

CHATS = [build_media_chat(("image", "light.png")),
         build_media_chat(("audio", "long.wav"), ("image", "dark.png"), ("image", "twin.png")),
         build_media_chat(("video", "moving.gif"), ("text", "Say."),
                          answer=[{"type": "audio", "path": "short.wav"}])]

CALLS = ("{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
         "<tool_call>{{ call.function.name }}\n{% for k, v in call.function.arguments.items() %}"
         "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
         "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}")
"""Chat template that renders tool calls in the format of OmniServe's track_b."""


def pack(omni: Path, corpus: Path, output: Path, *options: str) -> int:
    """Run `sov-data pack` and return its exit code."""
    return main(["pack", "--tokenizer", str(omni), "--input", str(corpus), "--output", str(output),
                 "--heldout", "0", "--workers", "1", *options])


def read_columns(folder: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """Return the source's manifest entry, and for each shard its ids, feature numbers, loss weights, and
    media records (pictures, sounds)."""
    source = read_manifest(folder).content["sources"][0]
    shards = []
    for record in source["splits"]["train"]["shards"]:
        prefix = folder / record["prefix"]
        shapes = read_bank_shapes(source[FEATURES], "it")
        columns = {"ids": np.asarray(open_split(prefix).tokens),
                   FEATURES: np.fromfile(f"{prefix}.{FEATURES}", "<i8"),
                   "loss": np.fromfile(f"{prefix}.loss", "<f4")}
        banks = {kind: open_bank(Path(f"{prefix}.{kind}"), shape) for kind, shape in shapes.items()}
        shards.append(columns | banks)
    return source, shards


@pytest.mark.parametrize("shard_tokens", ["1000000", "1"])
def test_placeholders_name_features_in_the_shard(encode: Encode, omni: Path, tmp_path: Path,
                                                 shard_tokens: str) -> None:
    assert encode(CHATS) == 0
    assert pack(omni, tmp_path / "corpus", tmp_path / "shards", "--format", "chat", "--shard-tokens",
                shard_tokens) == 0
    source, shards = read_columns(tmp_path / "shards")
    get_id = Tokenizer.from_file(str(omni / "tokenizer.json")).token_to_id
    assert source[FEATURES]["pictures"]["placeholder_ids"] == [get_id(IMAGE_PAD), get_id(VIDEO_PAD)]
    shades: list[int] = []
    for shard in shards:
        is_placeholder = np.isin(shard["ids"], [get_id(t) for t in (IMAGE_PAD, VIDEO_PAD, AUDIO_PAD)])
        assert ((shard[FEATURES] != NO_FEATURE) == is_placeholder).all()
        assert not shard["loss"][is_placeholder].any()
        numbers = shard[FEATURES][np.isin(shard["ids"], source[FEATURES]["pictures"]["placeholder_ids"])]
        # each picture has three feature rows: a placeholder's value is 3 * picture + row
        assert (numbers % 3).tolist() == [0, 1, 2] * (len(numbers) // 3)
        shades += [int(shard["pictures"][n // 3].max()) for n in numbers[::3]]
        assert len(shard["pictures"]) == len(set((numbers // 3).tolist()))  # equal pictures stored once
    assert shades == [255, 0, 255, 0, 255]  # light, dark, twin, and the two frames of the animation
    sounds = np.concatenate([s[FEATURES][s["ids"] == get_id(AUDIO_PAD)] for s in shards])
    assert sounds.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # the two pieces of long.wav have 5 and 3 slots
    assert verify_shards(tmp_path / "shards")[0] == []


def test_assistant_media_tokens_are_learned(encode: Encode, omni: Path, tmp_path: Path) -> None:
    assert encode(CHATS[2:]) == 0
    assert pack(omni, tmp_path / "corpus", tmp_path / "shards", "--format", "chat") == 0
    _, (shard,) = read_columns(tmp_path / "shards")
    tokenizer = Tokenizer.from_file(str(omni / "tokenizer.json"))
    learned = tokenizer.decode(shard["ids"][shard["loss"] > 0].tolist(), skip_special_tokens=False)
    assert learned.startswith("<|discrete_audio_start|><|audio0007|><|discrete_audio_end|>")


def test_drawn_picture_is_learned_as_call(encode: Encode, omni: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    for name, template in (("calls", CALLS), ("names", CALLS.replace("{{ v }}", ""))):
        with create_artifact(tmp_path / name, "tokenizer") as artifact:
            shutil.copy(omni / "tokenizer.json", artifact.path)
            config = json.loads((omni / "tokenizer_config.json").read_text()) | {"chat_template": template}
            (artifact.path / "tokenizer_config.json").write_text(json.dumps(config))
            artifact.content = read_manifest(omni).content
    assert encode([build_media_chat(("text", "Draw."), answer=[{"type": "image", "path": "light.png"}])]) == 0
    assert pack(tmp_path / "calls", tmp_path / "corpus", tmp_path / "shards", "--format", "chat") == 0
    _, (shard,) = read_columns(tmp_path / "shards")
    tokenizer = Tokenizer.from_file(str(omni / "tokenizer.json"))
    learned = tokenizer.decode(shard["ids"][shard["loss"] > 0].tolist(), skip_special_tokens=False)
    assert learned.startswith("<tool_call>t2i_model_generation\n<arg_key>discrete_image_token</arg_key>\n"
                              "<arg_value><|discrete_image_start|><|vision_ratio_1:1|><|vision00007|>")
    white_id = tokenizer.token_to_id("<|vision00007|>")
    assert shard["ids"].tolist().count(white_id) == 4 and shard["loss"][shard["ids"] == white_id].all()
    assert pack(omni, tmp_path / "corpus", tmp_path / "other", "--format", "chat") == 2
    assert "does not show" in capsys.readouterr().err  # this preset's template shows no calls
    assert pack(tmp_path / "names", tmp_path / "corpus", tmp_path / "other", "--format", "chat") == 2
    assert "media tokens, and 0 after the chat template" in capsys.readouterr().err


def test_documents_learn_everything_except_placeholders(encode: Encode, omni: Path, tmp_path: Path) -> None:
    assert encode([{"content": [{"type": "text", "text": "A <|end|> b"},
                                {"type": "image", "path": "dark.png"}]}]) == 0
    assert pack(omni, tmp_path / "corpus", tmp_path / "shards") == 0
    _, (shard,) = read_columns(tmp_path / "shards")
    tokenizer = Tokenizer.from_file(str(omni / "tokenizer.json"))
    assert shard["loss"].sum() == len(shard["ids"]) - 3  # all but the 3 placeholders of the picture
    assert list(shard["ids"]).count(tokenizer.token_to_id("<|end|>")) == 0  # "<|end|>" is encoded as text
    text = tokenizer.decode(shard["ids"].tolist(), skip_special_tokens=False)
    assert text.startswith("A <|end|> b\n<|mime_start|>") and text.count("<|vision00000|>") == 4
    assert text.endswith(json.loads((omni / "tokenizer_config.json").read_text())["eos_token"])


def test_media_tokens_in_text_corpora_stay_text(omni: Path, tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text(json.dumps({"text": "see <|vision00001|><|IMAGE_PAD|>", "media": {}}))
    assert pack(omni, tmp_path / "web.jsonl", tmp_path / "shards") == 0
    prefix = tmp_path / "shards/web/train-00000"
    tokenizer = Tokenizer.from_file(str(omni / "tokenizer.json"))
    ids = open_split(prefix).tokens.tolist()
    assert not {tokenizer.token_to_id("<|vision00001|>"), tokenizer.token_to_id(IMAGE_PAD)} & set(ids)


def test_placeholder_count_must_equal_feature_count(omni: Path) -> None:
    tokenizer = Tokenizer.from_file(str(omni / "tokenizer.json"))
    vocabulary = MediaVocabulary(tokenizer, MediaEncoding((("pictures", 2), ("sounds", 5))))
    pad = tokenizer.token_to_id(IMAGE_PAD)
    # picture record 3 begins at feature 3 x 2
    assert vocabulary.numbers([1, pad, pad, 2], {"pictures": [(3, 2)]}).tolist() == [-1, 6, 7, -1]
    for ids, rows, code in (([pad], {}, "placeholders"), ([1], {"pictures": [(0, 1)]}, "placeholders"),
                            ([pad] * 3, {"pictures": [(0, 3)]}, "media_rows"),
                            ([pad], {"sounds": [(0, 1)]}, "placeholders")):
        with pytest.raises(BadRecord) as error:
            vocabulary.numbers(ids, rows)  # type: ignore[arg-type]
        assert error.value.code == code
    with pytest.raises(BadRecord, match="which the tokenizer lacks"):
        vocabulary.split("<|vision09999|>")


def test_unsuitable_corpora_are_one_message(encode: Encode, omni: Path, tokenizers: dict[str, Path],
                                            tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(CHATS[:1]) == 0
    (tmp_path / "web.jsonl").write_text('{"text": "a"}\n')
    corpus, out = tmp_path / "corpus", tmp_path / "shards"
    for tokenizer, path, options, message in (
            (tokenizers["solar-open"], corpus, ("--format", "chat"), "has 0 tokens of image"),
            (omni, corpus, (), "pack it with --format chat"),
            (omni, corpus / "records.jsonl", ("--format", "chat"), "pass the folder"),
            (omni, corpus, ("--format", "chat", "--input", str(tmp_path / "web.jsonl")),
             "is no media corpus")):
        assert pack(tokenizer, path, out, *options) == 2
        assert message in capsys.readouterr().err


def test_damaged_banks_are_found(encode: Encode, omni: Path, tmp_path: Path) -> None:
    assert encode(CHATS[:1]) == 0
    assert pack(omni, tmp_path / "corpus", tmp_path / "shards", "--format", "chat") == 0
    file = next((tmp_path / "shards").rglob("*.pictures"))
    file.write_bytes(b"")
    assert any("3 placeholders of pictures name none of its 0 records" in p
               for p in verify_shards(tmp_path / "shards")[0])
    file.write_bytes(b"abc")
    assert any("not whole records" in p for p in verify_shards(tmp_path / "shards")[0])
