"""A model that is shown a picture and a sound, and draws and speaks: by the commands, through files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov import cli
from megatron_sov.artifacts import new_artifact
from tests.omni_model import GRID, save_codecs, save_omni_model

PLAIN = ("model.vision=null", "model.audio=null", "train.precision=fp64")
LIKES = ("<|discrete_image_start|>", "<|discrete_audio_start|>", "<|discrete_audio_end|>")
ASK = ("generate model --image seven.png --audio word.wav --prompt What? --image-tokenizer pictures "
       "--audio-tokenizer sounds --max-audio-tokens 5 --max-new-tokens 48 --json "
       "--temperature 1 --out-image {0} --image-decoder pictures --out-audio {0} --vocoder sounds")


@pytest.fixture
def site(tmp_path: Path, packed_data: Any, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, codecs, a picture and a sound."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save("seven.png")
    soundfile.write("word.wav", random.uniform(-0.5, 0.5, 4000), 16_000)
    save_codecs(Path("pictures"), Path("sounds"))
    save_omni_model(Path("model").absolute(), packed_data.tokenizer, PLAIN, likes=LIKES)
    return tmp_path


def told(folder: str, line: str) -> int:
    """Runs inside ranks: the command, in a folder."""
    import os

    os.chdir(folder)
    return cli.main(shlex.split(line))


@pytest.mark.distributed
def test_pictures_are_whole_and_the_same_at_other_layouts(site: Path, capsys: pytest.CaptureFixture[str],
                                                          ranks: Any, job: Any) -> None:
    assert cli.main(shlex.split(ASK.format("one"))) == 0
    (reply,) = json.loads(capsys.readouterr().out)
    assert len(reply["pictures"]) >= 1 and len(reply["sounds"]) == 1 and reply["broken_pictures"] <= 1
    assert Image.open(reply["pictures"][0]).size == (16, 16)
    assert "<|" not in reply["text"] and GRID == 4
    codes = ranks(*(job(__file__, "told", 2, {"folder": str(site), "line": ASK.format(layout)
                                              + f" --set parallel.{layout}=2"}) for layout in ("tp", "pp")))
    assert codes == [[0, 0], [0, 0]]
    files = {file.name: file.read_bytes() for file in Path("one").iterdir()}
    for layout in ("tp", "pp"):
        assert {file.name: file.read_bytes() for file in Path(layout).iterdir()} == files


def test_what_it_makes_is_judged(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a judge that hears nothing but "seven"; a text that it writes is compared as it is."""
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
    found = json.loads(capsys.readouterr().out)
    assert (found["text-image"]["accuracy"], found["text-image"]["chance"]) == (1.0, 0.5)
    assert found["audio-text"]["accuracy"] == 0.0
    assert [file.parent.name for file in Path("made").rglob("*.png")][:1] == ["text-image"]


def test_a_model_that_learned_from_features_is_not_shown_less(
        tmp_path: Path, packed_data: Any, one_rank: None, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with new_artifact(Path("shards"), "token_shards") as shards:
        shards.content = {"sources": [{"media": {"pictures": {}}}]}
    Image.new("L", (16, 16)).save("seven.png")
    save_codecs(Path("pictures"), Path("sounds"))
    save_omni_model(tmp_path / "model", packed_data.tokenizer,
                    (f'data.paths={json.dumps({str(tmp_path / "shards"): 1.0})}',))
    assert cli.main(shlex.split("generate model --image seven.png --image-tokenizer pictures")) == 2
    assert "has learned from features of pictures (model.vision)" in capsys.readouterr().err
