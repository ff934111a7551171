"""`megatron-sov codec`: the commands of its page, and refused command lines."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov import cli
from megatron_sov.chat.media_tokens import AUDIO, VocabularyBlock
from megatron_sov.omni.codecs.folder import open_codec, save_codec
from megatron_sov.omni.codecs.ta_tok import SiglipSettings, TATok, TATokSettings
from megatron_sov.omni.generation.replies import MarkIds, split_reply
from tests.omni import hf_folders
from tests.pages_typed import list_commands, page_text

PAGE = page_text("omni.md").partition("\n### Picture and sound codecs\n")[2].partition("\n## ")[0]


@pytest.fixture
def media(cwd: Path) -> Path:
    """Pictures and sounds where the page has them."""
    rng = np.random.default_rng(0)
    for name in ("pictures", "sounds"):
        Path(name).mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
        soundfile.write(f"sounds/{i}.wav", rng.uniform(-0.5, 0.5, 4000 + 1000 * i), 8000 + 8000 * (i % 2))
    return cwd


@pytest.mark.deep
def test_the_page_is_typed(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs all commands of the page, except imports of weight files, which tests/omni/codecs tests."""
    for kind, folder in (("vqmodel", "ldm-vq"), ("dac", "dac_16khz"), ("mimi", "mimi")):
        hf_folders.save_network(kind, Path(folder))
    typed = [line for line in list_commands(PAGE) if not re.search(r"import (ta-tok|cosy)", line)]
    assert len(typed) == 5
    for line in typed:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    for output in ("wrote codec image-tokenizer", "wrote codec speech-tokenizer", "wrote again/1.png",
                   "wrote again/0.wav"):
        assert output in printed
    assert Image.open("again/0.png").size == (16, 16)
    sound, rate_hz = soundfile.read("again/0.wav")
    assert rate_hz == 16_000 and 7900 < len(sound) <= 8000 and sound.ndim == 1
    assert open_codec("speech-tokenizer").codebook_size == 3 * 64
    assert open_codec("audio-tokenizer").codebook_size == 512
    parts = split_reply([7, 8, 1003, 1001, 9, 1002], [VocabularyBlock(AUDIO, 1000, 512)], MarkIds())
    assert str(parts) in PAGE


@pytest.mark.parametrize(("line", "message"), [
    ("inspect pictures", "codec inspect: was removed in this version; `megatron-sov inspect CODEC`"),
    ("reconstruct none a.png --output y", "none: does not exist, so it is not a 'codec' artifact"),
    ("reconstruct ta-tok a.png --output y", "does not both encode and decode (TATok)"),
    ("import ta-tok a b --codebooks 2", "--codebooks 2: is for mimi and dac; leave it out for ta-tok"),
    ("import dac sounds x", "sounds/config.json: cannot be read as JSON"),
    ("import mimi4 none x", "mimi4"),
    ("import ta-tok bad/no.png x", "pass the weights as safetensors"),
    ("import cosyvoice2 none x", "none: does not exist")])
def test_a_bad_command_line_is_one_sentence(media: Path, get_refusal: Any, line: str, message: str) -> None:
    Path("bad").mkdir()
    save_codec(Path("ta-tok"), "ta-tok", TATok(TATokSettings(8, SiglipSettings(4, 8, 8, 1, 2), 4, 16)))
    Path("bad/no.png").write_bytes(b"no picture")
    assert message in get_refusal("codec", *shlex.split(line))
    assert not Path("x").exists()
