"""Accuracy of a tiny model that reads and generates images, speech and text, scored by independent models.

    python benchmarks/omni/any_to_any.py --work FOLDER > benchmarks/results/omni_any_to_any.txt

Media: scikit-learn's handwritten digits, and eleven words spoken by espeak-ng in English and Korean. The
commands are those of docs/omni.md: `codec import`, `sov-tokenizer train | media`, `sov-data encode-media |
pack`, `pretrain`, `sft`, `eval media`, `eval ppl`. All media of the evaluation are held out: other images,
pitches and speeds. Independent recognizers score generated images and speech (`judges.py`); their ceiling is
their accuracy on held-out media after encoding and decoding with the codec. A second model, trained on the
same text without media, shows the cost of media for text in bits per byte. A killed run resumes in the same
folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402  (after the folders of benchmarks)
from command_lines import format_settings, format_single_phase, run_command, write_jsonl  # noqa: E402
from judges import WORDS, pictures, sounds  # noqa: E402
from measurement import describe_machine  # noqa: E402
from media_sets import build_conversations, build_questions, write_media  # noqa: E402
from seeds import format_over_seeds  # noqa: E402
from train_codec import train_codec  # noqa: E402

VOCAB_SIZE, AUDIO_SIZE, IMAGE_SIZE = 512, 512, 128
CODECS = {"image-tokenizer": ("pictures", "pictures-train", 1500, IMAGE_SIZE, "vqmodel"),
          "audio-tokenizer": ("sounds", "sounds-train", 1500, AUDIO_SIZE, "dac")}
"""Codec -> kind of media, folder of the media, training steps, codes, kind of codec."""
SETTINGS = ("model.vision=null", "model.audio=null", "train.micro_batch_size=8", "train.global_batch_size=8",
            "train.num_threads=1")
TEXT_SHARE = 0.2
"""Share of text in pretraining with media."""


def print_progress(text: str) -> None:
    """Print progress to stderr; results go to stdout."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class SharedInputs:
    """Inputs of all seeds: media, codecs, tokenizer, token shards of text."""

    def __init__(self, work: Path, codec_steps: int) -> None:
        """Create the missing inputs. `codec_steps`: training steps of a codec; 0: those of `CODECS`."""
        self.work, self.media = work, work / "media"
        index_file = work / "index.json"
        if not index_file.exists():
            print_progress("media")
            work.mkdir(parents=True, exist_ok=True)
            index_file.write_text(json.dumps(write_media(self.media), ensure_ascii=False))
        self.index = json.loads(index_file.read_text())
        for name, (kind, media, steps, codes, codec) in CODECS.items():
            if not (work / name / "manifest.json").exists():
                print_progress(f"codec {name}")
                train_codec(kind, self.media / media, work / f"{name}-hf", codec_steps or steps, codes)
                run_command(work / "codecs.log", "megatron_sov", "codec", "import", codec,
                            work / f"{name}-hf", work / name)
        self._train_tokenizer()
        if not (work / "text-shards/manifest.json").exists():
            self.pack("text-shards", "text", "0.05", work / "text.jsonl")

    def _train_tokenizer(self) -> None:
        if (self.work / "tokenizer/manifest.json").exists():
            return
        print_progress("tokenizer")
        pages = [paragraph for file in sorted((HERE.parents[1] / "docs").glob("*.md"))
                 for paragraph in file.read_text().split("\n\n") if len(paragraph) > 200]
        write_jsonl(self.work / "text.jsonl", ({"text": page} for page in pages))
        spoken = [part["text"] for rows in build_conversations(self.index, 0).values() for row in rows
                  for message in row["messages"] for part in message["content"] if part["type"] == "text"]
        # text that surrounds media in a prompt
        surrounding = ['{"id": "audio_00", "type": "audio/wav", "filename": "00000.wav"}',
                       '{"id": "image_00", "type": "image/png", "filename": "00000.png"}',
                       "다음 중 audio_duration은 오디오 길이 정보입니다. 참고하여 답변하세요. "
                       '{"audio_duration": "0.60"}']
        write_jsonl(self.work / "words.jsonl", ({"text": text} for text in [*spoken, *surrounding * 500]))
        log = self.work / "tokenizer.log"
        run_command(log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", str(VOCAB_SIZE),
                    "--input", self.work / "text.jsonl", self.work / "words.jsonl", "--output",
                    self.work / "text-tokenizer", "--overwrite")
        run_command(log, "tokenizer.cli", "media", self.work / "text-tokenizer", "--audio-tokens",
                    str(AUDIO_SIZE), "--image-tokens", str(IMAGE_SIZE), "--output", self.work / "tokenizer",
                    "--overwrite")

    def pack(self, output: str, kind: str, heldout: str, source: Path) -> None:
        """Pack records of a kind into the token shards WORK/output."""
        run_command(self.work / "pack.log", "data_prep.cli", "pack", "--tokenizer", self.work / "tokenizer",
                    "--format", kind, "--heldout", heldout, "--workers", "1", "--input", source, "--output",
                    self.work / output, "--overwrite")

    def list_model_settings(self) -> list[str]:
        """Return the model's settings that follow from the tokenizer."""
        content = json.loads((self.work / "tokenizer/manifest.json").read_text())["content"]
        return [f"model.vocab_size={content['vocab_size']}",
                *(f"model.{kind}_tokens.{name}={block[name]}" for kind, block in content["media"].items()
                  for name in ("first", "size"))]


class SeedRun:
    """One seed: a model with media, a model of text only, and their scores."""

    def __init__(self, shared: SharedInputs, seed: int, steps: int) -> None:
        self.shared, self.seed, self.folder = shared, seed, shared.work / f"seed-{seed}"
        self.steps = {"media": steps // 3, "text": max(1, round(steps // 3 * TEXT_SHARE)), "sft": steps}

    def pack_conversations(self) -> Path:
        """Return the token shards of the seed's conversations, and create them if they are missing."""
        shards, corpus = self.folder / "shards", self.folder / "corpus"
        if (shards / "manifest.json").exists():
            return shards
        print_progress(f"seed {self.seed}: encode-media and pack")
        conversations = build_conversations(self.shared.index, self.seed)
        write_jsonl(self.folder / "records.jsonl", (row for rows in conversations.values() for row in rows))
        if not (corpus / "manifest.json").exists():
            run_command(self.folder / "encode.log", "data_prep.cli", "encode-media", "--input",
                        self.folder / "records.jsonl", "--media-root", self.shared.media, "--image-tokenizer",
                        self.shared.work / "image-tokenizer", "--audio-tokenizer",
                        self.shared.work / "audio-tokenizer", "--drawn", "content", "--threads", "1",
                        "--output", corpus)
        self.shared.pack(f"seed-{self.seed}/shards", "chat", "0", corpus)
        return shards

    def train(self, name: str, command: str, recipe: str, data: Sequence[str | Path], lr: float,
              *options: str | Path) -> Path:
        """Train, unless the run is complete; return the run."""
        folder, begin_s = self.folder / name, time.time()
        if not (folder / "complete.json").exists():
            sources = [word for source in data for word in ("--data", source)]
            settings = [*self.shared.list_model_settings(), *SETTINGS, f"train.seed={self.seed}",
                        f"train.steps={self.steps[name]}", f"optim.lr={lr}", f"optim.min_lr={lr / 20}",
                        format_single_phase(256)]
            run_command(self.folder / f"{name}.log", "megatron_sov", command, recipe, *sources, "--run",
                        folder, "--resume", *format_settings(*settings), *options)
            wall_s = time.time() - begin_s
            print_progress(f"seed {self.seed}: {name}, {self.steps[name]} steps in {wall_s:.0f} s")
        return folder

    def compute_figures(self, num_drawn: int) -> dict[str, Any]:
        """Return all figures of the seed; `num_drawn`: images to generate."""
        shards, text = self.pack_conversations(), self.shared.work / "text-shards"
        recipe = "tiny-hyperclova-omni"
        mixture = [f"{shards}:{1 - TEXT_SHARE}", f"{text}:{TEXT_SHARE}"]
        runs = {"media": self.train("media", "pretrain", recipe, mixture, 4e-3),
                "text": self.train("text", "pretrain", recipe, [text], 4e-3)}
        runs["sft"] = self.train("sft", "sft", f"{recipe}-sft", [shards], 3e-3, "--from", runs["media"],
                                 "--set", "objective.text_coeff=0")
        figures = self._evaluate_media(runs["sft"], num_drawn)
        for name, folder in runs.items():
            figures[f"bits_per_byte/{name}"] = self._measure_bits_per_byte(folder, text)
        return figures

    def _evaluate_media(self, model: Path, num_drawn: int) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        image_codec, audio_codec = self.shared.work / "image-tokenizer", self.shared.work / "audio-tokenizer"
        for name, rows in build_questions(self.shared.index, num_drawn).items():
            pair, stem = name.partition("/")[0], name.replace("/", "-")
            output = self.folder / f"answers/{stem}.json"
            if not output.exists():
                questions = self.folder / f"asked/{stem}.jsonl"
                write_jsonl(questions, rows)
                # greedy, except for prompts that occur several times
                temperature = "0.7" if pair.startswith("text-") else "0"
                run_command(
                    self.folder / "eval.log", "megatron_sov", "eval", "media", model, "--data",
                    f"{pair}={questions}", "--media-root", self.shared.media, "--image-tokenizer",
                    image_codec, "--audio-tokenizer", audio_codec, "--image-decoder", image_codec,
                    "--vocoder", audio_codec, "--image-judge", f"{HERE / 'judges.py'}:pictures",
                    "--audio-judge", f"{HERE / 'judges.py'}:sounds", "--files", self.folder / "made" / stem,
                    "--max-new-tokens", "64", "--max-audio-tokens", "40", "--temperature", temperature,
                    "--batch-size", "64", "--run", model, "--output", output)
                print_progress(f"seed {self.seed}: evaluated {name}")
            scores[name] = json.loads(output.read_text())[pair]
        return scores

    def _measure_bits_per_byte(self, folder: Path, text: Path) -> float:
        output = self.folder / f"bpb-{folder.name}.json"
        if not output.exists():
            run_command(self.folder / "eval.log", "megatron_sov", "eval", "ppl", folder, "--data", text,
                        "--output", output)
        (scores,) = json.loads(output.read_text()).values()
        return float(scores["bits_per_byte"])


def compute_ceilings(shared: SharedInputs) -> dict[str, tuple[float, float]]:
    """Return kind of media -> accuracy of the recognizers on held-out media, and on the same media after
    encoding and decoding with the codec."""
    from megatron_sov.omni.generation.reconstruction import reconstruct_media

    accuracies: dict[str, tuple[float, float]] = {}
    questions = build_questions(shared.index, 0)
    for name, codec, judge in (("image-text", "image-tokenizer", pictures),
                               ("audio-text", "audio-tokenizer", sounds)):
        rows = questions[name]
        files = [shared.media / part["path"] for row in rows for part in row["content"] if "path" in part]
        reconstructed = list(reconstruct_media(shared.work / codec, files, shared.work / "reconstructed"))
        labels = [row["labels"] for row in rows]
        is_english = np.array([choices[0].isascii() for choices in labels])
        right = []
        for media in (files, reconstructed):
            answers = zip(judge(media, labels), rows, strict=True)
            right.append(np.array([answer == row["answer"] for answer, row in answers]))
        if name == "image-text":
            accuracies["pictures"] = (float(right[0].mean()), float(right[1].mean()))
        else:
            for language, mask in (("English speech", is_english), ("Korean speech", ~is_english)):
                accuracies[language] = (float(right[0][mask].mean()), float(right[1][mask].mean()))
    return accuracies


def print_report(shared: SharedInputs, figures_of_seeds: dict[int, dict[str, Any]],
                 ceilings: dict[str, tuple[float, float]]) -> None:
    print(f"{describe_machine()}; one process of one thread")
    print(f"{len(WORDS)} words in English and Korean, ten digits; the evaluation uses held-out media\n")
    print("Accuracy of the recognizers on held-out media, as recorded and after the codec:")
    for name, (real, coded) in ceilings.items():
        print(f"  {name:<16} {real:6.1%} {coded:6.1%}")
    print("\nRight, by pair (mean and interval over seeds):             chance   rows a seed")
    first = next(iter(figures_of_seeds.values()))
    for name, figures in first.items():
        if isinstance(figures, dict):
            shares = [100 * seed[name]["accuracy"] for seed in figures_of_seeds.values()]
            print(f"  {name:<24} {format_over_seeds(shares, '5.1f')} %   {figures['chance']:6.1%}   "
                  f"{figures['num_rows']}")
    for name, figures in first.items():
        if isinstance(figures, dict) and "cer" in figures:
            rates = [seed[name]["cer"] for seed in figures_of_seeds.values()]
            print(f"  characters wrong, {name:<20} {format_over_seeds(rates, '5.3f')}")
    copied_shares = [100 * compute_copied_share(shared, seed, figures)
                     for seed, figures in figures_of_seeds.items()]
    print("\nGenerated pictures with the tokens of a training picture: "
          f"{format_over_seeds(copied_shares, '5.1f')} %")
    print("\nText, bits per byte of held-out text:")
    labels = (("text", "pretrained on text alone"), ("media", "pretrained on as much text and media"),
              ("sft", "then fine-tuned on media without text"))
    for name, label in labels:
        bits = [figures[f"bits_per_byte/{name}"] for figures in figures_of_seeds.values()]
        print(f"  {label:<42} {format_over_seeds(bits, '5.3f')}")


def compute_copied_share(shared: SharedInputs, seed: int, figures: dict[str, Any]) -> float:
    """Return the share of generated pictures whose tokens equal those of a training picture."""
    from megatron_sov.chat.media_tokens import IMAGE, parse_codebook_tokens

    corpus = shared.work / f"seed-{seed}/corpus"
    training_images = {tuple(parse_codebook_tokens(IMAGE, line)) for file in corpus.glob("*.jsonl")
                       for line in file.read_text().splitlines()}  # no conversation has two pictures
    generated = [tuple(tokens) for sample in figures["text-image"]["samples"]
                 for tokens in sample["tokens"]["image"]]
    return sum(tokens in training_images for tokens in generated) / max(1, len(generated))


def main() -> None:
    """Run incomplete commands, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of all files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500,
                        help="fine-tuning steps; pretraining takes a third of them")
    parser.add_argument("--codec-steps", type=int, default=0, help="steps of both codecs (0: their defaults)")
    parser.add_argument("--drawn", type=int, default=200, help="images to generate")
    args = parser.parse_args()
    shared = SharedInputs(args.work, args.codec_steps)
    figures = {seed: SeedRun(shared, seed, args.steps).compute_figures(args.drawn) for seed in args.seeds}
    print_report(shared, figures, compute_ceilings(shared))


if __name__ == "__main__":
    main()
