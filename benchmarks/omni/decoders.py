"""What decoders make of tokens of media that they never saw, judged by a classifier and a recogniser that we
did not train.

    python benchmarks/omni/decoders.py > benchmarks/results/omni_decoders.txt

A tokenizer of pictures and one of sounds are trained on scikit-learn's digits and on words of espeak-ng
(`digits.py`, `speech.py`), then a picture decoder and a vocoder on the tokens, all by the functions behind
`megatron-sov codec train`.  Held-out pictures and sounds become tokens and are decoded.  Pictures: how often
the judge sees the right digit.  Speech: how often the recogniser hears the right word, and STOI, the
intelligibility measure of pystoi, over all words one behind the other.  Beside them stand the real media and
decoders with the weights of before training.  Held-out words are the same words, at speeds that lie between
those of training.  `--seed` gives another training; one core, some minutes.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import numpy as np
import soundfile
import speech
import torch
from PIL import Image
from pystoi import stoi

from megatron_sov.base.settings import change
from megatron_sov.omni.codecs.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.dit import DiT
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.training import decoders, tokenizers

RATE_HZ = speech.SAMPLE_RATE_HZ
TRAIN_WPM, HELDOUT_WPM = (120, 140, 160, 180), (130, 150, 170)
PIECE_TOKENS, SILENCE_S = 5, 0.08
SETTINGS = {
    "image-tokenizer": ["model.side_pixels=16", "model.grid=4", "model.width=64", "model.num_layers=2",
                        "model.num_heads=4", "model.code_width=16", "model.codebook_size=256",
                        "learning.learning_rate=0.002"],
    "audio-tokenizer": ["model.width=96", "model.num_blocks=3", "model.num_mels=40", "model.levels=[8,8,8]",
                        "learning.batch_size=16", "learning.learning_rate=0.002", "learning.crop_tokens=16"],
    "image-decoder": ["model.side_pixels=16", "model.size_multiple_pixels=2", "model.patch=2",
                      "model.width=96", "model.num_layers=3", "model.num_heads=4", "model.rope_axes=[8,8,8]",
                      "model.mlp_ratio=2", "learning.learning_rate=0.002"],
    "vocoder": ["model.sample_rate_hz=16000", "model.rates=[5,4,4,8]", "model.channels=128",
                "model.kernels=[7]", "model.dilations=[1]", "model.unit_width=64", "model.speaker_width=16",
                "model.lookahead_tokens=2",
                "learning.batch_size=4", "learning.segment_tokens=14", "learning.windows=[256,1024]",
                "learning.num_mels=64", "learning.quiet=0.1", "learning.judges_from_step=0",
                "learning.warmup_steps=20", "learning.learning_rate=0.003"],
}
"""Kind -> what differs from the settings of the published sizes."""


def say(line: str) -> None:
    """Print a line of the result at once."""
    print(line, flush=True)


def train(kind: str, media: Path, folder: Path, steps: int, seed: int, tokenizer: str = "") -> Any:
    """Return a trained codec, and say what it took."""
    begin_s, output = time.process_time(), folder / kind
    changes = [*SETTINGS[kind], f"learning.steps={steps}", f"learning.seed={seed}",
               "learning.heldout_share=0"]
    if tokenizer:
        decoders.train_decoder(media, output, change(decoders.SETTINGS[kind], changes),
                               folder / tokenizer)
    else:
        tokenizers.train_tokenizer(media, output, change(tokenizers.SETTINGS[kind](), changes))
    codec = open_codec(output)
    num = sum(weight.numel() for weight in codec.parameters())
    taken_s = time.process_time() - begin_s
    say(f"  {kind:16} {num:>9,} parameters, {steps:,} steps, {taken_s:.0f} s of one core")
    return codec


def write_pictures(folder: Path) -> None:
    """Write the digits to learn from as PNG files."""
    folder.mkdir()
    for row, picture in enumerate(digits.part("train")[0]):
        written = io.BytesIO()
        Image.fromarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(written, "PNG")
        (folder / f"{row:04}.png").write_bytes(written.getvalue())


def words(speeds_wpm: Sequence[int]) -> list[tuple[str, str, np.ndarray[Any, Any]]]:
    """Return (word, speaker, sound) of every word at every pitch, which stands for a speaker, and speed."""
    return [(word, f"pitch-{pitch}",
             speech.with_silence(speech.say(word, pitch=pitch, speed_wpm=speed), SILENCE_S))
            for word in speech.WORDS for pitch in speech.PITCHES for speed in speeds_wpm]


def write_words(folder: Path) -> None:
    """Write the words to learn from as WAV files, a folder for each speaker."""
    for row, (word, speaker, sound) in enumerate(words(TRAIN_WPM)):
        (folder / speaker).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / speaker / f"{row:04}-{word}.wav", sound, RATE_HZ, subtype="PCM_16")


def of_pictures(folder: Path, given: argparse.Namespace) -> None:
    """Say how well held-out digits are seen in what the decoder draws of their tokens."""
    say("Pictures: scikit-learn's digits, 16 x 16, 4 x 4 tokens of 256")
    write_pictures(folder / "pictures")
    tokenizer = train("image-tokenizer", folder / "pictures", folder, given.steps[0], given.seed)
    decoder = train("image-decoder", folder / "pictures", folder, given.steps[1], given.seed,
                    "image-tokenizer")
    pictures, labels = digits.part("heldout")
    ids = tokenizer.encode(torch.from_numpy(pictures))
    torch.manual_seed(given.seed)
    untrained = DiT(decoder.settings)
    begin_s = time.process_time()
    drawn = decoder.decode(ids, steps=given.sampler_steps, seed=given.seed).numpy()
    each_s = (time.process_time() - begin_s) / len(ids)
    shown = {"real": pictures, "tokenizer's own plain decoder": tokenizer.reconstruct(ids).numpy(),
             "picture decoder": drawn, "picture decoder, untrained": untrained.decode(ids, steps=2).numpy()}
    for name, seen in shown.items():
        right = float((digits.judge(seen) == labels).mean())
        error = float(((seen - pictures)**2).mean())
        say(f"  {name:32} digit right {right:6.1%}   PSNR {-10 * np.log10(max(error, 1e-10)):5.1f} dB")
    say(f"  {len(labels)} held-out digits, chance 10 %; {given.sampler_steps} steps of the sampler take "
        f"{each_s:.3f} s a picture")


def of_speech(folder: Path, given: argparse.Namespace) -> None:
    """Say how well held-out words are heard in what the vocoder says of their tokens."""
    say("Speech: eleven words of espeak-ng, 16 kHz, 25 tokens/s of 512, four speakers")
    write_words(folder / "words")
    tokenizer = train("audio-tokenizer", folder / "words", folder, given.steps[2], given.seed)
    vocoder = train("vocoder", folder / "words", folder, given.steps[3], given.seed, "audio-tokenizer")
    torch.manual_seed(given.seed)
    untrained = UnitBigVGAN(vocoder.settings)
    heldout = words(HELDOUT_WPM)
    ids = [tokenizer.encode(torch.from_numpy(sound)) for _, _, sound in heldout]
    begin_s = time.process_time()
    spoken = [vocoder.decode(i, speaker).numpy() for i, (_, speaker, _) in zip(ids, heldout, strict=True)]
    taken_s = time.process_time() - begin_s
    said = {"real": [sound for _, _, sound in heldout],
            "tokenizer's own plain decoder": [tokenizer.reconstruct(i).numpy() for i in ids],
            "vocoder": spoken,
            "vocoder, untrained": [untrained.decode(i, vocoder.speakers[0]).numpy() for i in ids]}
    for name, sounds in said.items():
        right = np.mean([speech.recognise(sound) == word for sound, (word, _, _) in
                         zip(sounds, heldout, strict=True)])
        pairs = [(a, b[:len(a)]) for (_, _, a), b in zip(heldout, sounds, strict=True)]
        clear = stoi(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]), RATE_HZ)
        say(f"  {name:32} word right  {right:6.1%}   STOI {clear:5.3f}")
    length_s = sum(map(len, spoken)) / RATE_HZ
    say(f"  {len(heldout)} held-out words, chance 9 %; a second of sound takes {taken_s / length_s:.3f} s")
    streaming(vocoder, ids, heldout)


def streaming(vocoder: UnitBigVGAN, ids: Sequence[torch.Tensor],
              heldout: Sequence[tuple[str, str, Any]]) -> None:
    """Say how soon sound comes, and how far the stream is from the whole."""
    first_s, apart = [], 0.0
    for tokens, (_, speaker, _) in zip(ids[::10], heldout[::10], strict=True):
        begin_s, sounds = time.perf_counter(), []
        for sound in vocoder.stream(tokens.split(PIECE_TOKENS), speaker):
            if not sounds and len(sound):
                first_s.append(time.perf_counter() - begin_s)
            sounds.append(sound)
        apart = max(apart, float((torch.cat(sounds) - vocoder.decode(tokens, speaker)).abs().max()))
    say(f"  streaming in pieces of {PIECE_TOKENS} tokens: first sound {np.median(first_s):.3f} s "
        f"(median, on the clock) after them; at most {apart:.1e} from the whole")


def main() -> None:
    """Train, decode, judge."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=4, default=(300, 600, 300, 1500),
                        metavar=("IMAGE_TOKENIZER", "IMAGE_DECODER", "AUDIO_TOKENIZER", "VOCODER"))
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--only", choices=("pictures", "speech"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    say(f"seed {given.seed}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}")
    with tempfile.TemporaryDirectory() as name:
        if given.only != "speech":
            of_pictures(Path(name), given)
        if given.only != "pictures":
            of_speech(Path(name), given)
    say(f"{time.process_time():.0f} s of one core in all")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
