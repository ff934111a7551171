"""`megatron-sov codec`: its page, typed, and command lines that are refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from megatron_sov import cli
from megatron_sov.omni.codecs.folder import open_codec
from tests.pages_typed import ROOT, commands_of

PAGE = (ROOT / "docs/codecs.md").read_text()


@pytest.fixture
def media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures and sounds where the page has them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("pictures", "sounds"):
        Path(name).mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
        soundfile.write(f"sounds/{i}.wav", rng.uniform(-0.5, 0.5, 4000 + 1000 * i), 8000 + 8000 * (i % 2))
    return tmp_path


def test_the_page_is_typed(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but `codec import`, which takes what others publish: tests/omni/codecs/test_published.py."""
    typed = [line for line in commands_of(PAGE) if " import " not in line]
    assert len(typed) == 5
    for line in typed:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    for said in ("wrote codec image-tokenizer: held out, psnr_db",
                 "wrote codec audio-tokenizer: held out, mel_error", "kind        simvq",
                 "settings    codebook_size = 64", "held out    used_share = ", "wrote again/1.png",
                 "wrote again/0.wav"):
        assert said in printed
    assert Image.open("again/0.png").size == (16, 16)
    sound, rate_hz = soundfile.read("again/0.wav")
    assert (rate_hz, len(sound), sound.ndim) == (16_000, 8000, 1)
    tokenizer = open_codec("image-tokenizer")
    assert tokenizer.embed(tokenizer.encode(torch.rand(2, 3, 16, 16))).shape == (2, 16, 16)
    assert cli.main(["codec", "inspect", "audio-tokenizer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["levels"] == [4, 4, 4]


@pytest.mark.parametrize(("line", "said"), [
    ("train image-tokenizer --input none --output x", "--input none: is neither a folder nor a list of"),
    ("train image-tokenizer --input sounds --output x", "--input sounds: has no file that ends with .png"),
    ("train image-tokenizer --input pictures --output x --set steps=3", "steps: no such setting"),
    ("train image-tokenizer --input pictures --output pictures", "pictures: already exists"),
    ("train image-tokenizer --input bad --output x --set model.side_pixels=24", "bad/no.png: "),
    ("train vocoder2 --input pictures --output x", "vocoder2"),
    ("inspect pictures", "has no manifest.json, so it is not a 'codec' artifact; pass the folder that "
                         "`megatron-sov codec train`"),
    ("reconstruct none a.png --output y", "none: does not exist, so it is not a 'codec' artifact"),
    ("import ta-tok bad/no.png x", "cannot be read without running what it holds"),
    ("import cosyvoice2 none x", "none: does not exist")])
def test_a_bad_command_line_is_one_sentence(media: Path, capsys: pytest.CaptureFixture[str], line: str,
                                            said: str) -> None:
    Path("bad").mkdir()
    Path("bad/no.png").write_bytes(b"no picture")
    assert cli.main(["codec", *shlex.split(line)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert not Path("x").exists()
