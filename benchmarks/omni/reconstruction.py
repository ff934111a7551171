"""What is left of held-out pictures and speech behind a tokenizer: untrained, plain quantisation, ours.

    python benchmarks/omni/reconstruction.py

Pictures are digits (digits.py), 16 x 16 in 16 tokens of 256; speech is espeak-ng's (speech.py), English and
Korean, 25 tokens a second of 4,096.  Encoder, decoder, media, steps and seeds are the same for all; what
differs is the quantiser: vector-quantize-pytorch's VectorQuantize with its defaults, or SimVQ (pictures) and
FSQ (speech).  "No quantiser" has the frames of a sound untouched: what the search for phases alone costs.

PSNR and SSIM are scikit-image's; STOI is pystoi's, of phrases at a pitch and speed that were not learned
from; judges are a support vector classifier of digits and PocketSphinx, none of them trained on what is ours.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits
import numpy as np
import speech
import torch
from pystoi import stoi
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from vector_quantize_pytorch import VectorQuantize

from megatron_sov.omni.codecs.quantised import FSQSettings, FSQTokenizer, SimVQSettings, SimVQTokenizer
from megatron_sov.omni.codecs.training.tokenizers import (
    AudioTokenizerTask, CodebookUsage, ImageTokenizerTask, Learning)

sys.path.append(str(Path(__file__).parents[1]))
from seeds import over_seeds

SEEING = SimVQSettings(side_pixels=16, grid=4, width=64, num_layers=2, num_heads=4, code_width=16,
                       codebook_size=256)
HEARING = FSQSettings(num_mels=80, width=96, num_blocks=3, levels=(4,) * 6)
LEARNING = Learning(steps=300, learning_rate=3e-3, warmup_steps=20, crop_tokens=24)
PHRASES = {speech.ENGLISH: ("hello yellow window", "one lemon in summer", "five zero three two four"),
           speech.KOREAN: ("안녕하세요 반갑습니다", "하나 둘 셋 넷 다섯", "오늘은 날씨가 좋습니다")}
KNOWN = ((30, 120), (40, 160), (60, 140), (70, 180))
"""Pitch and speed of the speech that is learned from."""
NEW = (50, 150)
FORMS = {"SSIM": ".3f", "STOI": ".3f"}
Figures = dict[str, float]


class Plain(torch.nn.Module):
    """Vector quantisation as the library has it, called as ours is."""

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.book = VectorQuantize(dim=width, codebook_size=codebook_size)

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes, ids and the commitment loss."""
        codes, ids, loss = self.book(vectors)
        return codes, ids, loss.sum()

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return ids."""
        ids: torch.Tensor = self.book(vectors)[1]
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return codes."""
        codes: torch.Tensor = self.book.get_codes_from_indices(ids)
        return codes


class PlainImages(SimVQTokenizer):
    """The tokenizer of pictures with the plain quantiser."""

    def make_quantiser(self) -> torch.nn.Module:
        """Return the baseline."""
        return Plain(self.settings.code_width, self.settings.codebook_size)


class PlainSounds(FSQTokenizer):
    """The tokenizer of sounds with the plain quantiser."""

    def make_quantiser(self) -> torch.nn.Module:
        """Return the baseline."""
        return Plain(self.code_width, self.codebook_size)


def of_pictures(network: SimVQTokenizer) -> Figures:
    """Return the figures of held-out pictures."""
    pictures, labels = digits.part("heldout")
    network.eval()
    ids = network.encode(torch.from_numpy(pictures))
    again = network.reconstruct(ids).numpy()
    usage = CodebookUsage(network.codebook_size)
    usage.add(ids)
    pairs = list(zip(pictures, again, strict=True))
    return {"PSNR dB": float(np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs])),
            "SSIM": float(np.mean([structural_similarity(a, b, data_range=1, channel_axis=0)
                                   for a, b in pairs])),
            "digit right %": 100 * float((digits.judge(again) == labels).mean()),
            "perplexity": usage.figures()["perplexity"], "used %": 100 * usage.figures()["used_share"]}


def spoken(pitch: int, speed_wpm: int) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Return what is said, and how it sounds, at one pitch and speed: words, then phrases."""
    texts = [(word, speech.ENGLISH) for word in speech.WORDS]
    texts += [(phrase, voice) for voice, phrases in PHRASES.items() for phrase in phrases]
    return [(text, speech.with_silence(speech.say(text, voice, pitch, speed_wpm), 0.1))
            for text, voice in texts]


def of_sounds(again: Callable[[torch.Tensor], torch.Tensor], usage: CodebookUsage | None = None) -> Figures:
    """Return the figures of held-out speech."""
    right, understood = [], []
    for text, sound in spoken(*NEW):
        heard = again(torch.from_numpy(sound)).numpy()[:len(sound)]
        if text in speech.WORDS:
            right.append(speech.recognise(heard) == text)
        else:
            understood.append(stoi(sound[:len(heard)], heard, speech.SAMPLE_RATE_HZ))
    figures = {"STOI": float(np.mean(understood)), "word right %": 100 * float(np.mean(right))}
    if usage is not None:
        used = usage.figures()
        figures |= {"perplexity": used["perplexity"], "used %": 100 * used["used_share"]}
    return figures


def through(network: FSQTokenizer) -> Figures:
    """Return the figures of held-out speech through a tokenizer."""
    network.eval()
    usage = CodebookUsage(network.codebook_size)

    def again(sound: torch.Tensor) -> torch.Tensor:
        ids = network.encode(sound)
        usage.add(ids)
        return network.reconstruct(ids)

    return of_sounds(again, usage)


def trained(task: ImageTokenizerTask | AudioTokenizerTask) -> Any:
    """Return the tokenizer behind all steps."""
    for step in range(1, task.learning.steps + 1):
        task.learn(step)
    return task.codec()


def pictures_rows(seeds: Sequence[int]) -> dict[str, list[Figures]]:
    """Return model -> figures of each seed."""
    raw, _ = digits.part("train")
    bank, none = (raw * 255).round().astype(np.uint8), np.zeros((0, 3, 16, 16), np.uint8)
    rows: dict[str, list[Figures]] = {"untrained": [], "plain VQ": [], "SimVQ (ours)": []}
    for seed in seeds:
        learning = replace(LEARNING, seed=seed, batch_size=32)
        for name, cls in (("plain VQ", PlainImages), ("SimVQ (ours)", SimVQTokenizer)):
            torch.manual_seed(seed)
            task = ImageTokenizerTask(cls(SEEING), learning, bank, none)
            if cls is SimVQTokenizer:
                rows["untrained"].append(of_pictures(task.network))
            rows[name].append(of_pictures(trained(task)))
    return rows


def sounds_rows(seeds: Sequence[int]) -> dict[str, list[Figures]]:
    """Return model -> figures of each seed."""
    sounds = [sound for pitch, speed_wpm in KNOWN for _, sound in spoken(pitch, speed_wpm)]
    frames = FSQTokenizer(HEARING).frames
    rows: dict[str, list[Figures]] = {"untrained": [], "plain VQ": [], "FSQ (ours)": []}
    known = {"no quantiser": [of_sounds(lambda sound: frames.sound(frames(sound[None]))[0])]}
    for seed in seeds:
        learning = replace(LEARNING, seed=seed, batch_size=8)
        for name, cls in (("plain VQ", PlainSounds), ("FSQ (ours)", FSQTokenizer)):
            torch.manual_seed(seed)
            task = AudioTokenizerTask(cls(HEARING), learning, sounds, [])
            if cls is FSQTokenizer:
                rows["untrained"].append(through(task.network))
            rows[name].append(through(trained(task)))
    return rows | known


def table(title: str, rows: dict[str, list[Figures]]) -> str:
    """Return a table of means over seeds with their intervals."""
    names = list(next(iter(rows.values()))[0])
    lines = [title, f"{'':16}" + "".join(f"{name:>20}" for name in names)]
    for model, seeds in rows.items():
        cells = [over_seeds([figures[name] for figures in seeds], FORMS.get(name, ".1f"))
                 if name in seeds[0] else "" for name in names]
        lines.append(f"{model:16}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--media", nargs="+", choices=("pictures", "speech"), default=["pictures", "speech"])
    args = parser.parse_args()
    seeds = range(args.seeds)
    torch.set_num_threads(1)
    begin_s = time.process_time()
    print(f"{platform.machine()}, one core, torch {torch.__version__}; {LEARNING.steps} steps, {len(seeds)} "
          "seeds: mean ± half of the 95 % interval\n")
    if "pictures" in args.media:
        print(table("held-out pictures (270): 16 tokens of 256", pictures_rows(seeds)), "\n", flush=True)
    if "speech" in args.media:
        print(table("held-out speech (11 words, 6 phrases): 25 tokens a second of 4,096", sounds_rows(seeds)))
    print(f"\n{time.process_time() - begin_s:.0f} s of processor time")


if __name__ == "__main__":
    main()
