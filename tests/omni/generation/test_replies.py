"""Replies with pictures and speech: the commands that generate them, and the rules for their tokens."""

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

LIKELY_TOKENS = ("<|discrete_image_start|>", "<|discrete_audio_start|>", "<|discrete_audio_end|>")
GENERATE = ("generate {0}/model --image {0}/seven.png --audio {0}/word.wav --prompt What? --prompt Why? "
       "--image-tokenizer {0}/pictures --audio-tokenizer {0}/sounds --max-audio-tokens 5 "
       "--max-new-tokens 45 --json --temperature 1 --out-image {0}/{1} --image-decoder {0}/pictures "
       "--out-audio {0}/{1} --vocoder {0}/sounds")
"""Command line; {0}: `site`, {1}: the output folder in it."""
GRID = 2
"""A picture has 2 x 2 tokens."""
NAMES = ["a", "b", "<end>", *MARKS, *(codebook_token(AUDIO, i) for i in range(5)),
         *(codebook_token(IMAGE, i) for i in range(6))]
IDS = {name: i for i, name in enumerate(NAMES)}
BLOCKS = {AUDIO: VocabularyBlock(AUDIO, IDS[codebook_token(AUDIO, 0)], 5),
          IMAGE: VocabularyBlock(IMAGE, IDS[codebook_token(IMAGE, 0)], 6)}
PICTURE_ROW = rf"(<\|vision\d+\|>){{{GRID}}}<\|vision_eol\|>"
PICTURE = (r"<\|discrete_image_start\|><\|vision_ratio_\d+:\d+\|>"
           rf"({PICTURE_ROW}){{{GRID}}}<\|vision_eof\|><\|discrete_image_end\|>")
"""Pattern of a complete picture."""
SPEECH = r"<\|discrete_audio_start\|>(<\|audio\d+\|>){1,3}<\|discrete_audio_end\|>"
"""Pattern of one to three tokens of speech."""


@pytest.fixture(scope="module")
def shared_folder(as_one_rank: dict[str, str], tmp_path_factory: pytest.TempPathFactory,
                  packed_data: Any) -> Path:
    """A folder with codecs, a picture, a sound, and a model with encoders whose replies often start media."""
    folder, generator = tmp_path_factory.mktemp("site"), np.random.default_rng(0)
    Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / "seven.png")
    soundfile.write(folder / "word.wav", generator.uniform(-0.5, 0.5, 4000), 16_000)
    save_codecs(folder / "pictures", folder / "sounds")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in as_one_rank.items():
            environment.setenv(name, value)
        settings = ("train.precision=fp64", f'data.paths={json.dumps({str(folder / "shards"): 1.0})}')
        save_omni_model(folder / "model", packed_data.tokenizer, settings, likes=LIKELY_TOKENS)
    return folder


@pytest.fixture
def site(shared_folder: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`shared_folder` as working directory; its training data have no media."""
    monkeypatch.chdir(shared_folder)
    write_shards_manifest({})
    return shared_folder


def write_shards_manifest(media: dict[str, Any]) -> None:
    """Write the manifest of training data whose source has these banks of media, without the data."""
    with create_artifact(Path("shards"), "token_shards", overwrite=True) as shards:
        shards.content = {"sources": [{"media": media}]}


@pytest.mark.deep
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp", pytest.param("pp", marks=pytest.mark.deep)])
def test_pictures_are_complete_and_equal_at_other_layouts(
        layout: str, site: Path, capsys: pytest.CaptureFixture[str], run_checked: Any) -> None:
    write_shards_manifest({"pictures": {}, "sounds": {}})
    assert cli.main([*shlex.split(GENERATE.format(site, "bare")), "--no-features"]) == 0
    replies_without_features = json.loads(capsys.readouterr().out)
    assert cli.main(shlex.split(GENERATE.format(site, "one"))) == 0
    replies = json.loads(capsys.readouterr().out)
    pictures, sounds = ([file for reply in replies for file in reply[kind]]
                        for kind in ("pictures", "sounds"))
    assert [reply["text"] for reply in replies] != [reply["text"] for reply in replies_without_features]
    assert len(replies) == 2 and len(pictures) >= 2 and len(sounds) >= 1
    assert {Image.open(file).size for file in pictures} == {(16, 16)}
    assert all(soundfile.info(file).frames for file in sounds)
    for reply in replies:  # only the last picture can be incomplete, if the reply ended in it
        assert reply["broken_pictures"] <= 1 and "<|" not in reply["text"]
    files = {file.name: file.read_bytes() for file in Path("one").iterdir()}
    run_checked(*shlex.split(GENERATE.format(site, layout)), "--nproc", "2", "--set", f"parallel.{layout}=2")
    assert {file.name: file.read_bytes() for file in Path(layout).iterdir()} == files


@pytest.mark.deep
def test_eval_media_scores_generated_pictures(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image judge always sees "seven", so every picture is right; the reply to the sound is wrong."""
    Path("judges.py").write_text("def seen(files, labels):\n    return ['seven' for _ in files]\n")
    drawing = {"content": [{"type": "text", "text": "Draw seven."}], "answer": "seven",
               "labels": ["six", "seven"]}
    listening = {"content": [{"type": "audio", "path": "word.wav"}], "answer": "no such word"}
    Path("drawn.jsonl").write_text(json.dumps(drawing))
    Path("heard.jsonl").write_text(json.dumps(listening))
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
    command = "generate model --audio word.wav --audio-tokenizer sounds --max-new-tokens 2"
    assert cli.main(shlex.split(command)) == 0
    assert "encoder" not in capsys.readouterr().err
    shutil.rmtree("shards")
    assert cli.main(shlex.split(command)) == 0
    stderr = capsys.readouterr().err
    assert "has an encoder of sounds, and training data that would show" in stderr
    assert "prompts do not use it, as its adapter was frozen" in stderr
    assert cli.main(shlex.split("generate model --audio word.wav --max-new-tokens 2")) == 2
    assert "is of kind audio, which needs --audio-tokenizer CODEC" in capsys.readouterr().err


def build_rules(grid: int = GRID, speaks: bool = True) -> BlockRules:
    """Return rules for pictures of `grid` x `grid` tokens (0: no pictures) and speech of up to 3 tokens."""
    return BlockRules.from_vocabulary(len(NAMES), BLOCKS, IDS.get, grid=grid, speaks=speaks,
                                      max_audio_tokens=3)


def draw_reply(rules: BlockRules, seed: int) -> list[int]:
    """Return the token ids of a random reply within the rules, which often starts media."""
    rng, reply = random.Random(seed), list[int]()
    start_marks = {IDS[f"<|discrete_{kind}_start|>"] for kind in ("image", "audio")}
    while len(reply) < 200 and reply[-1:] != [IDS["<end>"]]:
        allowed = np.flatnonzero(rules.allowed(reply)).tolist()
        if rng.random() < 0.3:
            allowed = [i for i in allowed if i in start_marks] or allowed
        reply.append(rng.choice(allowed))
    return reply


@pytest.mark.each("seed", range(20))
def test_allowed_replies_are_well_formed(seed: int) -> None:
    reply = draw_reply(build_rules(), seed)
    text = "".join(NAMES[i] for i in reply)
    assert re.fullmatch(rf"([ab]|{PICTURE}|{SPEECH})*<end>", text), text
    parts = split_reply(reply, list(BLOCKS.values()), MarkIds.from_vocabulary(IDS.get))
    pictures = [part for part in parts if isinstance(part, replies.ImagePart)]
    assert all(part.complete and len(part.tokens) == GRID ** 2 for part in pictures)
    assert len(pictures) == text.count("discrete_image_start")
    num_audio_tokens = sum(len(part.tokens) for part in parts if isinstance(part, replies.AudioPart))
    assert num_audio_tokens == len(re.findall(r"<\|audio\d", text))


def test_well_formed_replies_are_allowed() -> None:
    picture = ["<|discrete_image_start|>", "<|vision_ratio_9:16|>",
               codebook_token(IMAGE, 0), codebook_token(IMAGE, 5), "<|vision_eol|>",
               codebook_token(IMAGE, 3), codebook_token(IMAGE, 3), "<|vision_eol|>",
               "<|vision_eof|>", "<|discrete_image_end|>"]
    speech = ["<|discrete_audio_start|>", codebook_token(AUDIO, 4), codebook_token(AUDIO, 0),
              "<|discrete_audio_end|>"]
    reply = [IDS[name] for name in ["a", *picture, *speech, "b", *speech, *picture, "<end>"]]
    for place, token in enumerate(reply):
        assert build_rules().allowed(reply[:place])[token], NAMES[token]


def test_kinds_without_output_are_not_started() -> None:
    def draw_text(rules: BlockRules) -> str:
        return "".join(NAMES[i] for seed in range(5) for i in draw_reply(rules, seed))

    assert re.fullmatch(r"([ab]*<end>)*|[ab]{200}", draw_text(build_rules(grid=0, speaks=False)))
    spoken = draw_text(build_rules(grid=0))
    assert "audio" in spoken and "vision" not in spoken


def test_vocabulary_without_media_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="discrete tokens of kind"):
        BlockRules.from_vocabulary(10, {}, IDS.get, grid=4)
    with pytest.raises(UserError, match="discrete tokens of kind"):
        BlockRules.from_vocabulary(len(NAMES), BLOCKS, {"a": 0}.get, speaks=True)
