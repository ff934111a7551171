"""A tiny model from images, speech and text to any of them: trained with the real commands, scored by
independent models.

    python benchmarks/omni/any_to_any.py --work FOLDER > benchmarks/results/omni_any_to_any.txt

Media: scikit-learn's handwritten digits, and eleven words spoken by espeak-ng in English and Korean. The
commands are those of docs/omni.md: `codec import`, `sov-tokenizer train | media`, `sov-data encode-media |
pack`, `pretrain`, `sft`, `eval media`, `eval ppl`. All media of the evaluation are held out: handwriting of
other people, other pitches and speeds. Independent recognizers score generated images and speech
(`judges.py`); their ceiling is their accuracy on held-out media after encoding and decoding with the codec. A
model trained on the same text without media shows what media cost the text.

A killed run resumes in the same folder.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402  (behind the places of benchmarks)
from judges import WORDS, pictures, sounds  # noqa: E402
from media_sets import build_conversations, build_questions, write_media, write_rows  # noqa: E402
from seed_runs import run, words  # noqa: E402
from seeds import over_seeds  # noqa: E402
from train_codec import train as train_codec  # noqa: E402

VOCAB_SIZE, AUDIO_SIZE, IMAGE_SIZE = 512, 512, 128
CODECS = {"image-tokenizer": ("pictures", "pictures-train", 1500, IMAGE_SIZE, "vqmodel"),
          "audio-tokenizer": ("sounds", "sounds-train", 1500, AUDIO_SIZE, "dac")}
"""Codec -> kind of media, their folder, steps, codes, and kind of codec."""
MODEL = ("model.vision=null", "model.audio=null", "train.micro_batch_size=8", "train.global_batch_size=8",
         "train.num_threads=1")
TEXT_SHARE = 0.2


def print_progress(text: str) -> None:
    """Print progress to stderr; results go to stdout."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Shared:
    """Inputs that all seeds share: media, codecs, tokenizer, token shards."""

    def __init__(self, work: Path) -> None:
        self.work, self.media = work, work / "media"

    def make(self, codec_steps: int) -> None:
        """Create the missing inputs."""
        index_file = self.work / "index.json"
        if not index_file.exists():
            print_progress("media")
            index_file.parent.mkdir(parents=True, exist_ok=True)
            index = write_media(self.media)
            index_file.write_text(json.dumps(index, ensure_ascii=False))
        self.index = json.loads(index_file.read_text())
        for name, (kind, media, steps, codes, codec) in CODECS.items():
            if not (self.work / name / "manifest.json").exists():
                print_progress(f"codec {name}")
                train_codec(kind, self.media / media, self.work / f"{name}-hf", codec_steps or steps, codes)
                run(self.work / "codecs.log", "megatron_sov", "codec", "import", codec,
                    self.work / f"{name}-hf", self.work / name)
        self._tokenizer()

    def _tokenizer(self) -> None:
        texts = self.work / "text.jsonl"
        if not texts.exists():
            pages = [p for file in sorted((HERE.parents[1] / "docs").glob("*.md"))
                     for p in file.read_text().split("\n\n") if len(p) > 200]
            write_rows(texts, ({"text": page} for page in pages))
            chats = build_conversations(self.index, 0)
            said = [part["text"] for rows in chats.values() for row in rows for m in row["messages"]
                    for part in m["content"] if part["type"] == "text"]
            # text around media in a prompt
            around = ['{"id": "audio_00", "type": "audio/wav", "filename": "00000.wav"}',
                      '{"id": "image_00", "type": "image/png", "filename": "00000.png"}',
                      "다음 중 audio_duration은 오디오 길이 정보입니다. 참고하여 답변하세요. "
                      '{"audio_duration": "0.60"}']
            write_rows(self.work / "words.jsonl", ({"text": text} for text in [*said, *around * 500]))
        if not (self.work / "tokenizer/manifest.json").exists():
            print_progress("tokenizer")
            run(self.work / "tokenizer.log", "tokenizer.cli", "train", "--preset", "solar-open",
                "--vocab-size", str(VOCAB_SIZE), "--input", texts, self.work / "words.jsonl", "--output",
                self.work / "text-tokenizer", "--overwrite")
            run(self.work / "tokenizer.log", "tokenizer.cli", "media", self.work / "text-tokenizer",
                "--audio-tokens", str(AUDIO_SIZE), "--image-tokens", str(IMAGE_SIZE), "--output",
                self.work / "tokenizer", "--overwrite")
        if not (self.work / "text-shards/manifest.json").exists():
            self._pack("text-shards", "text", "0.05", texts)

    def _pack(self, output: str, kind: str, heldout: str, *inputs: str | Path) -> None:
        run(self.work / "pack.log", "data_prep.cli", "pack", "--tokenizer", self.work / "tokenizer",
            "--format", kind, "--heldout", heldout, "--workers", "1", "--input", *inputs, "--output",
            self.work / output, "--overwrite")

    def shards(self, seed: int) -> Path:
        """Return the token shards of a seed's conversations."""
        out = self.work / f"seed-{seed}/shards"
        if (out / "manifest.json").exists():
            return out
        print_progress(f"seed {seed}: encode-media and pack")
        file, corpus = self.work / f"seed-{seed}/records.jsonl", self.work / f"seed-{seed}/corpus"
        write_rows(file, (row for rows in build_conversations(self.index, seed).values() for row in rows))
        if not (corpus / "manifest.json").exists():
            run(self.work / f"seed-{seed}/encode.log", "data_prep.cli", "encode-media", "--input", file,
                "--media-root", self.media, "--image-tokenizer", self.work / "image-tokenizer",
                "--audio-tokenizer", self.work / "audio-tokenizer", "--drawn", "content", "--threads", "1",
                "--output", corpus)
        self._pack(f"seed-{seed}/shards", "chat", "0", corpus)
        return out

    def blocks(self) -> list[str]:
        """Return the model's settings that follow from the tokenizer."""
        content = json.loads((self.work / "tokenizer/manifest.json").read_text())["content"]
        found = [f"model.{kind}_tokens.{name}={block[name]}" for kind, block in content["media"].items()
                 for name in ("first", "size")]
        return [f"model.vocab_size={content['vocab_size']}", *found]


class Seed:
    """One seed: a model with media and one with text only, and their scores."""

    def __init__(self, shared: Shared, seed: int, steps: int) -> None:
        self.shared, self.seed = shared, seed
        self.folder = shared.work / f"seed-{seed}"
        self.steps = {"media": steps // 3, "text": max(1, round(steps // 3 * TEXT_SHARE)), "sft": steps}

    def train(self, name: str, command: str, recipe: str, data: Sequence[str | Path], lr: float,
              *more: str | Path) -> Path:
        """Train, unless it is done; returns the run."""
        folder, began_s = self.folder / name, time.time()
        if not (folder / "complete.json").exists():
            data_words = [word for one in data for word in ("--data", str(one))]
            settings = [*self.shared.blocks(), *MODEL, f"train.seed={self.seed}",
                        f"train.steps={self.steps[name]}", f"optim.lr={lr}", f"optim.min_lr={lr / 20}",
                        'data.phases=[{"name": "main", "seq_len": 256}]']
            run(self.folder / f"{name}.log", "megatron_sov", command, recipe, *data_words, "--run", folder,
                "--resume", *words(settings), *more)
            took_s = time.time() - began_s
            print_progress(f"seed {self.seed}: {name}, {self.steps[name]} steps in {took_s:.0f} s")
        return folder

    def run(self, num_drawn: int) -> dict[str, Any]:
        """Return all figures of the seed."""
        shards, text = self.shared.shards(self.seed), self.shared.work / "text-shards"
        recipe = "tiny-hyperclova-omni"
        both = [f"{shards}:{1 - TEXT_SHARE}", f"{text}:{TEXT_SHARE}"]
        media = self.train("media", "pretrain", recipe, both, 4e-3)
        only = self.train("text", "pretrain", recipe, [text], 4e-3)
        tuned = self.train("sft", "sft", f"{recipe}-sft", [shards], 3e-3, "--from", media, "--set",
                           "objective.text_coeff=0")
        result = self._ask(tuned, num_drawn)
        for name, folder in (("media", media), ("text", only), ("sft", tuned)):
            result[f"bits_per_byte/{name}"] = self._bits_per_byte(folder, text)
        return result

    def _ask(self, model: Path, num_drawn: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, rows in build_questions(self.shared.index, num_drawn).items():
            pair, stem = name.partition("/")[0], name.replace("/", "-")
            output = self.folder / f"answers/{stem}.json"
            if not output.exists():
                file = self.folder / f"asked/{stem}.jsonl"
                write_rows(file, rows)
                # greedy, except for prompts that occur several times
                temperature = "0.7" if pair.startswith("text-") else "0"
                run(self.folder / "eval.log", "megatron_sov", "eval", "media", model, "--data",
                    f"{pair}={file}", "--media-root", self.shared.media, "--image-tokenizer",
                    self.shared.work / "image-tokenizer", "--audio-tokenizer",
                    self.shared.work / "audio-tokenizer", "--image-decoder",
                    self.shared.work / "image-tokenizer", "--vocoder", self.shared.work / "audio-tokenizer",
                    "--image-judge", f"{HERE / 'judges.py'}:pictures", "--audio-judge",
                    f"{HERE / 'judges.py'}:sounds", "--files", self.folder / "made" / stem,
                    "--max-new-tokens", "64", "--max-audio-tokens", "40", "--temperature", temperature,
                    "--batch-size", "64", "--run", model, "--output", output)
                print_progress(f"seed {self.seed}: asked {name}")
            found[name] = json.loads(output.read_text())[pair]
        return found

    def _bits_per_byte(self, folder: Path, text: Path) -> float:
        out = self.folder / f"bpb-{folder.name}.json"
        if not out.exists():
            run(self.folder / "eval.log", "megatron_sov", "eval", "ppl", folder, "--data", text,
                "--output", out)
        (told,) = json.loads(out.read_text()).values()
        return float(told["bits_per_byte"])


def compute_ceilings(shared: Shared) -> dict[str, tuple[float, float]]:
    """Score held-out media directly, and after encoding and decoding with the codec."""
    from megatron_sov.omni.generation.reconstruction import reconstruct_media

    accuracies: dict[str, tuple[float, float]] = {}
    for name, rows in build_questions(shared.index, 0).items():
        media_parts = [next((p for p in row["content"] if p["type"] != "text"), None) for row in rows]
        if name not in ("image-text", "audio-text"):
            continue
        files = [shared.media / part["path"] for part in media_parts if part]
        kind, judge = (("image-tokenizer", pictures) if name == "image-text" else ("audio-tokenizer", sounds))
        reconstructed = list(reconstruct_media(shared.work / kind, files, shared.work / "reconstructed"))
        labels = [row["labels"] for row in rows]
        is_english = np.array([choices[0].isascii() for choices in labels])
        right = []
        for media in (files, reconstructed):
            answers = zip(judge(media, labels), rows, strict=True)
            right.append(np.array([answer == row["answer"] for answer, row in answers]))
        if name == "image-text":
            accuracies["pictures"] = (float(right[0].mean()), float(right[1].mean()))
        else:
            for language, which in (("English speech", is_english), ("Korean speech", ~is_english)):
                accuracies[language] = (float(right[0][which].mean()), float(right[1][which].mean()))
    return accuracies


def print_report(shared: Shared, figures_of_seeds: dict[int, dict[str, Any]],
                 tops: dict[str, tuple[float, float]]) -> None:
    """Print the results."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread")
    print(f"{len(WORDS)} words in English and Korean, ten digits; every medium that is shown is held out\n")
    print("What judges recognise in held-out media, as they are and through the codec alone:")
    for name, (real, coded) in tops.items():
        print(f"  {name:<16} {real:6.1%} {coded:6.1%}")
    print("\nRight, by pair (mean and range over seeds):                chance   rows a seed")
    first = next(iter(figures_of_seeds.values()))
    for name, figures in first.items():
        if isinstance(figures, dict):
            shares = [100 * seed[name]["accuracy"] for seed in figures_of_seeds.values()]
            print(f"  {name:<24} {over_seeds(shares, '5.1f')} %   {figures['chance']:6.1%}   "
                  f"{figures['num_rows']}")
    for name, figures in first.items():
        if isinstance(figures, dict) and "cer" in figures:
            rates = [seed[name]["cer"] for seed in figures_of_seeds.values()]
            print(f"  characters wrong, {name:<20} {over_seeds(rates, '5.3f')}")
    copied_shares = [100 * compute_copied_share(shared, seed, figures)
                     for seed, figures in figures_of_seeds.items()]
    print("\nDrawn pictures whose tokens are those of a training picture: "
          f"{over_seeds(copied_shares, '5.1f')} %")
    print("\nText, bits per byte of held-out text:")
    labels = (("text", "pretrained on text alone"), ("media", "on as much text, and media beside it"),
              ("sft", "after fine-tuning on media without text"))
    for name, label in labels:
        bits = [figures[f"bits_per_byte/{name}"] for figures in figures_of_seeds.values()]
        print(f"  {label:<42} {over_seeds(bits, '5.3f')}")


def compute_copied_share(shared: Shared, seed: int, figures: dict[str, Any]) -> float:
    """Return the share of drawn pictures that are, token for token, in the training data."""
    from megatron_sov.chat.media_tokens import IMAGE, parse_codebook_tokens

    corpus = shared.work / f"seed-{seed}/corpus"
    training_images = {tuple(parse_codebook_tokens(IMAGE, line)) for file in corpus.glob("*.jsonl")
                       for line in file.read_text().splitlines()}  # no conversation has two pictures
    drawn = [tuple(tokens) for sample in figures["text-image"]["samples"]
             for tokens in sample["tokens"]["image"]]
    return sum(tokens in training_images for tokens in drawn) / max(1, len(drawn))


def main() -> None:
    """Run unfinished parts, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of all files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500,
                        help="fine-tuning steps; pretraining takes a third of them")
    parser.add_argument("--codec-steps", type=int, default=0, help="steps of both codecs (0: their defaults)")
    parser.add_argument("--drawn", type=int, default=200, help="images to generate")
    args = parser.parse_args()
    shared = Shared(args.work)
    shared.make(args.codec_steps)
    found = {seed: Seed(shared, seed, args.steps).run(args.drawn) for seed in args.seeds}
    print_report(shared, found, compute_ceilings(shared))


if __name__ == "__main__":
    main()
