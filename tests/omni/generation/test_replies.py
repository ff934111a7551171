"""Commands that generate images and speech, and the token rules of media blocks."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov import cli
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, MARKS, VocabularyBlock, codebook_token
from megatron_sov.omni.generation import replies
from megatron_sov.omni.generation.replies import BlockRules, MarkIds, split_reply
from tests.omni_model import save_codecs, save_omni_model

LIKES = ("<|discrete_image_start|>", "<|discrete_audio_start|>", "<|discrete_audio_end|>")
ASK = ("generate {0}/model --image {0}/seven.png --audio {0}/word.wav --prompt What? --prompt Why? "
       "--image-tokenizer {0}/pictures --audio-tokenizer {0}/sounds --max-audio-tokens 5 "
       "--max-new-tokens 45 --json --temperature 1 --out-image {0}/{1} --image-decoder {0}/pictures "
       "--out-audio {0}/{1} --vocoder {0}/sounds")
GRID = 2
NAMES = ["a", "b", "<end>", *MARKS, *(codebook_token(AUDIO, i) for i in range(5)),
         *(codebook_token(IMAGE, i) for i in range(6))]
IDS = {name: i for i, name in enumerate(NAMES)}
BLOCKS = {AUDIO: VocabularyBlock(AUDIO, IDS[codebook_token(AUDIO, 0)], 5),
          IMAGE: VocabularyBlock(IMAGE, IDS[codebook_token(IMAGE, 0)], 6)}
ROW = rf"(<\|vision\d+\|>){{{GRID}}}<\|vision_eol\|>"
PICTURE = (r"<\|discrete_image_start\|><\|vision_ratio_\d+:\d+\|>"
           rf"({ROW}){{{GRID}}}<\|vision_eof\|><\|discrete_image_end\|>")
SPEECH = r"<\|discrete_audio_start\|>(<\|audio\d+\|>){1,3}<\|discrete_audio_end\|>"


@pytest.fixture(scope="module")
def made(as_one_rank: dict[str, str], tmp_path_factory: pytest.TempPathFactory, packed_data: Any) -> Path:
    """Folder with a model that has encoders, codecs, a picture and a sound."""
    folder, random = tmp_path_factory.mktemp("site"), np.random.default_rng(0)
    Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / "seven.png")
    soundfile.write(folder / "word.wav", random.uniform(-0.5, 0.5, 4000), 16_000)
    save_codecs(folder / "pictures", folder / "sounds")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in as_one_rank.items():
            environment.setenv(name, value)
        save_omni_model(folder / "model", packed_data.tokenizer, (
            "train.precision=fp64", f'data.paths={json.dumps({str(folder / "shards"): 1.0})}'), likes=LIKES)
    return folder


@pytest.fixture
def site(made: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as working directory."""
    monkeypatch.chdir(made)
    shards_with({})
    return made


def shards_with(media: dict[str, Any]) -> None:
    """Write a manifest of training data without the data."""
    with create_artifact(Path("shards"), "token_shards", overwrite=True) as shards:
        shards.content = {"sources": [{"media": media}]}


@pytest.mark.deep
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp", pytest.param("pp", marks=pytest.mark.deep)])
def test_pictures_are_complete_and_equal_at_other_layouts(
        layout: str, site: Path, capsys: pytest.CaptureFixture[str], run_command: Any) -> None:
    shards_with({"pictures": {}, "sounds": {}})
    assert cli.main([*shlex.split(ASK.format(site, "bare")), "--no-features"]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert cli.main(shlex.split(ASK.format(site, "one"))) == 0
    replies = json.loads(capsys.readouterr().out)
    pictures, sounds = ([file for reply in replies for file in reply[kind]]
                        for kind in ("pictures", "sounds"))
    assert [reply["text"] for reply in replies] != [reply["text"] for reply in bare]
    assert len(replies) == 2 and len(pictures) >= 2 and len(sounds) >= 1
    assert {Image.open(file).size for file in pictures} == {(16, 16)}
    assert all(soundfile.info(file).frames for file in sounds)
    for reply in replies:  # a picture that has begun is whole, or the reply ended in it
        assert reply["broken_pictures"] <= 1 and "<|" not in reply["text"]
    files = {file.name: file.read_bytes() for file in Path("one").iterdir()}
    ran = run_command(*shlex.split(ASK.format(site, layout)), "--nproc", "2", "--set", f"parallel.{layout}=2")
    assert ran.returncode == 0, ran.stderr
    assert {file.name: file.read_bytes() for file in Path(layout).iterdir()} == files


@pytest.mark.deep
def test_eval_media_scores_generated_pictures(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge always recognizes "seven"; texts are compared directly."""
    Path("judges.py").write_text("def seen(files, labels):\n    return ['seven' for _ in files]\n")
    drawn = {"content": [{"type": "text", "text": "Draw seven."}], "answer": "seven",
             "labels": ["six", "seven"]}
    heard = {"content": [{"type": "audio", "path": "word.wav"}], "answer": "no such word"}
    Path("drawn.jsonl").write_text(json.dumps(drawn))
    Path("heard.jsonl").write_text(json.dumps(heard))
    assert cli.main(shlex.split(
        "eval media model --data text-image=drawn.jsonl --data audio-text=heard.jsonl --media-root . "
        "--no-chat --image-decoder pictures --audio-tokenizer sounds --image-judge judges.py:seen "
        "--files made --max-new-tokens 48 --json")) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert (parsed["text-image"]["accuracy"], parsed["text-image"]["chance"]) == (1.0, 0.5)
    assert parsed["audio-text"]["accuracy"] == 0.0
    assert [file.parent.name for file in Path("made").rglob("*.png")][:1] == ["text-image"]


@pytest.mark.deep
def test_missing_training_data_are_reported(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "generate model --audio word.wav --audio-tokenizer sounds --max-new-tokens 2"
    assert cli.main(shlex.split(line)) == 0
    assert "encoder" not in capsys.readouterr().err
    shutil.rmtree("shards")
    assert cli.main(shlex.split(line)) == 0
    assert "has an encoder of sounds, and training data that would show" in (told := capsys.readouterr().err)
    assert "prompts do not use it, as its adapter was frozen" in told
    assert cli.main(shlex.split("generate model --audio word.wav --max-new-tokens 2")) == 2
    assert "is of kind audio, which needs --audio-tokenizer CODEC" in capsys.readouterr().err


def rules(grid: int = GRID, says: bool = True) -> BlockRules:
    return BlockRules.from_vocabulary(len(NAMES), BLOCKS, IDS.get, grid=grid, speaks=says, max_audio_tokens=3)


def written(made: BlockRules, seed: int) -> list[int]:
    """Return a random reply within the rules that often starts media."""
    draw, reply = random.Random(seed), list[int]()
    likes = {IDS[f"<|discrete_{kind}_start|>"] for kind in ("image", "audio")}
    while len(reply) < 200 and reply[-1:] != [IDS["<end>"]]:
        allowed = np.flatnonzero(made.allowed(reply)).tolist()
        reply.append(draw.choice([i for i in allowed if i in likes] or allowed)
                     if draw.random() < 0.3 else draw.choice(allowed))
    return reply


@pytest.mark.each("seed", range(20))
def test_allowed_replies_are_well_formed(seed: int) -> None:
    reply = written(rules(), seed)
    text = "".join(NAMES[i] for i in reply)
    assert re.fullmatch(rf"([ab]|{PICTURE}|{SPEECH})*<end>", text), text
    parts = split_reply(reply, list(BLOCKS.values()), MarkIds.from_vocabulary(IDS.get))
    pictures = [part for part in parts if isinstance(part, replies.ImagePart)]
    assert all(part.complete and len(part.tokens) == GRID ** 2 for part in pictures)
    assert len(pictures) == text.count("discrete_image_start")
    num_audio_tokens = sum(len(part.tokens) for part in parts if isinstance(part, replies.AudioPart))
    assert num_audio_tokens == len(re.findall(r"<\|audio\d", text))


def test_well_formed_replies_are_allowed() -> None:
    picture = ["<|discrete_image_start|>", "<|vision_ratio_9:16|>", codebook_token(IMAGE, 0),
               codebook_token(IMAGE, 5),
               "<|vision_eol|>", codebook_token(IMAGE, 3), codebook_token(IMAGE, 3), "<|vision_eol|>",
               "<|vision_eof|>",
               "<|discrete_image_end|>"]
    speech = ["<|discrete_audio_start|>", codebook_token(AUDIO, 4), codebook_token(AUDIO, 0),
              "<|discrete_audio_end|>"]
    reply = [IDS[name] for name in ["a", *picture, *speech, "b", *speech, *picture, "<end>"]]
    for place, token in enumerate(reply):
        assert rules().allowed(reply[:place])[token], NAMES[token]


def test_kinds_without_output_are_not_started() -> None:
    text = "".join(NAMES[i] for seed in range(5) for i in written(rules(grid=0, says=False), seed))
    assert re.fullmatch(r"([ab]*<end>)*|[ab]{200}", text)
    speaks = "".join(NAMES[i] for seed in range(5) for i in written(rules(grid=0), seed))
    assert "audio" in speaks and "vision" not in speaks


def test_vocabulary_without_media_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="discrete tokens of kind"):
        BlockRules.from_vocabulary(10, {}, IDS.get, grid=4)
    with pytest.raises(UserError, match="discrete tokens of kind"):
        BlockRules.from_vocabulary(len(NAMES), BLOCKS, {"a": 0}.get, speaks=True)
