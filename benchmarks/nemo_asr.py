"""A recogniser that NeMo itself made, trained and saved, as judge and filter: what it hears beside NeMo's
`transcribe`, and which sounds `sov-data encode-media` keeps by it.

Usage: PYTHONPATH=. PYTHON benchmarks/nemo_asr.py

PYTHON has the extra speech (docs/install.md) beside this framework.  The recogniser is tiny, of NeMo's own
networks, and learns here that five tones are five letters; the file is that of its `save_to`.  Every fourth
sound has the text of another one.  A second file names a language model, and a third a class of Python's.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

RATE_HZ, TONES_HZ = 16_000, {"a": 300.0, "b": 700.0, "c": 1300.0, "d": 2100.0, "e": 3100.0}
MODULES = "nemo.collections.asr.modules"
BLOCK = {"repeat": 1, "dilation": [1], "dropout": 0.0, "residual": False}
CONFIG: dict[str, Any] = {
    "sample_rate": RATE_HZ,
    "preprocessor": {"_target_": f"{MODULES}.AudioToMelSpectrogramPreprocessor", "sample_rate": RATE_HZ,
                     "features": 24, "window_size": 0.025, "window_stride": 0.01, "normalize": "per_feature"},
    "encoder": {"_target_": f"{MODULES}.ConvASREncoder", "feat_in": 24, "activation": "relu", "jasper": [
        {**BLOCK, "filters": 32, "kernel": [5], "stride": [2]},
        {**BLOCK, "filters": 32, "kernel": [5], "stride": [1]}]},
    "decoder": {"_target_": f"{MODULES}.ConvASRDecoder", "feat_in": 32, "num_classes": 6,
                "vocabulary": [" ", *TONES_HZ]}}
STEPS, SOUNDS, LONG_WORDS = 700, 24, 56


def sentence(draw: random.Random, words: int) -> str:
    """Return words of two to four letters."""
    return " ".join("".join(draw.choices(list(TONES_HZ), k=draw.randint(2, 4))) for _ in range(words))


def spoken(text: str, draw: random.Random) -> np.ndarray:
    """Return a text as tones [samples]: 0.12 s of each letter, gaps, and a little noise."""
    pieces = [np.zeros(RATE_HZ // 10)]
    for letter in text:
        time_s = np.arange(int(0.12 * RATE_HZ)) / RATE_HZ
        tone = np.sin(2 * np.pi * TONES_HZ[letter] * time_s) if letter in TONES_HZ else 0 * time_s
        pieces += [0.4 * tone, np.zeros(RATE_HZ // 25)]
    sound = np.concatenate([*pieces, np.zeros(RATE_HZ // 10)])
    noise = np.random.default_rng(draw.getrandbits(32)).normal(0, 0.003, len(sound))
    return (sound + noise).astype(np.float32)


def trained() -> Any:
    """Return NeMo's recogniser of the tones."""
    from nemo.collections.asr.models import EncDecCTCModel
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    draw, model = random.Random(0), EncDecCTCModel(cfg=OmegaConf.create(CONFIG)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    place = {letter: i for i, letter in enumerate(CONFIG["decoder"]["vocabulary"])}
    for _ in range(STEPS):
        texts = [sentence(draw, 3) for _ in range(8)]
        sounds = [torch.from_numpy(spoken(text, draw)) for text in texts]
        lengths = torch.tensor([len(sound) for sound in sounds])
        scores, frames, _ = model(input_signal=torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True),
                                  input_signal_length=lengths)
        targets = [torch.tensor([place[letter] for letter in text]) for text in texts]
        loss = model.loss(log_probs=scores, input_lengths=frames,
                          targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
                          target_lengths=torch.tensor([len(target) for target in targets]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  {sum(p.numel() for p in model.parameters()):,} parameters, {STEPS} steps, last loss "
          f"{float(loss):.3f}")
    return model.eval()


def compare(theirs: Any, ours: Any, folder: Path) -> tuple[bool, list[str]]:
    """Write sounds; print and return whether both hear the same, and what is said in each."""
    draw = random.Random(1)
    texts = [sentence(draw, draw.randint(2, 5)) for _ in range(SOUNDS)]
    for i, text in enumerate(texts):
        soundfile.write(folder / f"{i}.wav", spoken(text, draw), RATE_HZ, subtype="FLOAT")
    files = [str(folder / f"{i}.wav") for i in range(SOUNDS)]
    told = [hypothesis.text for hypothesis in theirs.transcribe(files, batch_size=1, verbose=False)]
    heard = [ours.hear(torch.from_numpy(soundfile.read(file, dtype="float32")[0])) for file in files]
    right = sum(a == b for a, b in zip(heard, texts, strict=True))
    same = [" ".join(a.split()) == b for a, b in zip(told, heard, strict=True)]
    print(f"  {sum(same)} of {SOUNDS} sounds are heard as NeMo's transcribe hears them, {right} as they were "
          "said")
    return all(same) and right > SOUNDS // 2, texts


def filtered(folder: Path, texts: list[str]) -> bool:
    """Filter sounds of which some have the text of others; print and return whether these alone fall out."""
    from data_prep.cli import main as data

    wrong = set(range(0, SOUNDS, 4))
    (folder / "records.jsonl").write_text("".join(json.dumps({"content": [
        {"type": "text", "text": "Said:"}, {"type": "audio", "path": f"{i}.wav", "text": texts[
            (i + 1) % SOUNDS if i in wrong else i]}]}) + "\n" for i in range(SOUNDS)))
    with contextlib.redirect_stdout(io.StringIO()):
        code = data(["encode-media", "--input", str(folder / "records.jsonl"), "--media-root", str(folder),
                     "--continuous-sounds", "80:30:750", "--recogniser", str(folder / "ears"), "--max-wer",
                     "0.5", "--bad-media", "skip", "--output", str(folder / "kept"), "--threads", "2"])
    bad = [json.loads(line) for line in (folder / "kept/bad_media.jsonl").read_text().splitlines()]
    print(f"  encode-media --max-wer 0.5: left out {len(bad)} of {SOUNDS}, {len(wrong)} of them with the "
          "text of another")
    print(f"    {bad[0]['code']}: {bad[0]['reason']}")
    return code == 0 and {int(row["medium"].partition(".")[0]) for row in bad} == wrong


def others(theirs: Any, folder: Path) -> Iterator[bool]:
    """Import files that name other things; print and yield whether these are left behind or refused."""
    from omegaconf import open_dict

    from megatron_sov.base.errors import UserError
    from megatron_sov.omni.codecs.folder import read_codec
    from megatron_sov.omni.codecs.published import import_codec

    with open_dict(theirs.cfg):
        theirs.cfg.decoding = {"strategy": "beam", "beam": {"kenlm_path": "/etc/passwd"}}
    theirs.save_to(str(folder / "beam.nemo"))
    import_codec("nemo-asr", folder / "beam.nemo", folder / "beam")
    config = read_codec(folder / "beam")[1].config
    print(f"  a language model for beams: left behind, {', '.join(config)} are kept")
    yield "passwd" not in str(config)
    with open_dict(theirs.cfg):
        theirs.cfg.encoder = {"_target_": "subprocess.Popen", "args": "id"}
    theirs.save_to(str(folder / "evil.nemo"))
    try:
        import_codec("nemo-asr", folder / "evil.nemo", folder / "evil")
    except UserError as e:
        print(f"  refused: {str(e).partition(': ')[2]}")
        yield True
    else:
        print("  a class of Python's WAS NAMED")
        yield False


def main() -> int:
    """Train, compare, filter and try the other files; 1: something is not as it should be."""
    warnings.simplefilter("ignore")
    from megatron_sov.omni.codecs.folder import open_codec
    from megatron_sov.omni.codecs.published import import_codec
    from megatron_sov.omni.media.heard import error_rates

    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"nemo-toolkit {version('nemo-toolkit')}, on a CPU")
    with tempfile.TemporaryDirectory() as name:
        folder, theirs = Path(name), trained()
        theirs.save_to(str(folder / "tones.nemo"))
        import_codec("nemo-asr", folder / "tones.nemo", folder / "ears")
        ours = open_codec(folder / "ears")
        same, texts = compare(theirs, ours, folder)
        draw = random.Random(2)
        long = sentence(draw, LONG_WORDS)
        sound = torch.from_numpy(spoken(long, draw))
        print(f"  {len(sound) / RATE_HZ:.1f} s of {LONG_WORDS} words in pieces of 30 s: "
              f"{error_rates(long, ours.hear(sound))[0]:.0%} of words wrong")
        return int(not all([same, filtered(folder, texts), *others(theirs, folder)]))


if __name__ == "__main__":
    sys.exit(main())
