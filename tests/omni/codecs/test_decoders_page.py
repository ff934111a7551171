"""docs/media_decoders.md: its commands and its Python as they stand there, on a few small media."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from megatron_sov.cli import main
from megatron_sov.omni.codecs.folder import save_codec
from megatron_sov.omni.codecs.quantised import FSQSettings, FSQTokenizer, SimVQSettings, SimVQTokenizer

PAGE = (Path(__file__).parents[3] / "docs/media_decoders.md").read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, voices and tokenizers of both."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Path("pictures").mkdir()
    for i in range(4):
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
    for speaker in ("her", "him"):
        Path("voices", speaker).mkdir(parents=True)
        soundfile.write(f"voices/{speaker}/0.wav", random.uniform(-0.5, 0.5, 7000), 16_000)
    torch.manual_seed(0)
    pictures = SimVQSettings(side_pixels=16, grid=4, width=8, num_layers=1, num_heads=1, code_width=4,
                             codebook_size=16)
    sounds = FSQSettings(num_mels=8, width=8, num_blocks=1, levels=(8, 8, 8))
    save_codec(Path("pic-tok"), "simvq", SimVQTokenizer(pictures))
    save_codec(Path("snd-tok"), "fsq", FSQTokenizer(sounds))
    return tmp_path


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_leads_from_media_to_pictures_and_sound(site: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in _blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    assert [line.split()[2] for line in lines] == ["train"] * 2 + ["reconstruct"] * 2 + ["inspect"]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr()
    assert Image.open("drawn/0.png").size == (16, 16)
    assert soundfile.info("said/0.wav").frames == 7000
    shown = capsys.readouterr().out
    assert "wrote codec painter: held out, loss" in shown and "kind        unit-bigvgan" in shown
    names: dict[str, object] = {}
    for code, printed in zip(_blocks("python"), _blocks("text"), strict=True):
        exec(compile(code, "the page", "exec"), names)
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("line", "message"), [
    ("train vocoder --input voices --output out", "--tokenizer: is missing"),
    ("train vocoder --input voices --output out --tokenizer pic-tok", "is no tokenizer of sounds"),
    ("train image-decoder --input pictures --output out --tokenizer snd-tok", "no tokenizer of pictures"),
    ("train image-tokenizer --input pictures --output out --tokenizer pic-tok", '"pic-tok": is for image'),
    ("train vocoder --input voices --output out --tokenizer snd-tok --vae x", '"x": is for image-decoder'),
    ("train image-decoder --input pictures --output out --tokenizer pic-tok --vae pictures",
     "is no folder of diffusers' AutoencoderKL"),
    ("train vocoder --input voices --output out --tokenizer snd-tok --set model.tokens_per_s=50 "
     "--set model.rates=[8,6,10]", "the tokenizer has 25 tokens a second"),
    ("train vocoder --input voices --output out --tokenizer snd-tok --set model.rates=[8,6]", "model.rates"),
    ("train image-decoder --input pictures --output out --tokenizer pic-tok --set model.side_pixels=20",
     "model.side_pixels = 20 must be a multiple of size_multiple_pixels"),
    ("train image-decoder --input voices --output out --tokenizer pic-tok", "has no file that ends with"),
    ("reconstruct snd-tok voices/her/0.wav --output said --decoder pic-tok", "is a codec of kind 'simvq'"),
])
def test_a_wrong_command_is_one_sentence(site: Path, line: str, message: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codec", *shlex.split(line)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert not Path("out").exists() and not Path("drawn").exists() and not Path("said").exists()
