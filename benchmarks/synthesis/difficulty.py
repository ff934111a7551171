"""How well `sov-data difficulty` tells pass rates of problems that it has not seen.

    python benchmarks/synthesis/difficulty.py --work FOLDER [--steps 400] [--problems 800]

Small transformers learn arithmetic, asked in English and in Korean; five checkpoints of two sizes are the
five configurations of models.  A model's true pass rate on a problem is the probability that it gives to the
right answer, character by character, at temperature 1: no drawing stands between it and the figures.  Labels
are what a team would have: 8 answers of each configuration to each problem, drawn with these probabilities,
and pairs from a judge that is wrong in 15 of 100 cases.  `sov-data difficulty label` and `fit` see the labels
alone; their estimator is compared with the true rates of 600 problems of which they have seen nothing.

A model that is trained and an arm that is measured are not done again: what is killed goes on.

Beside it stands what one writes first: TfidfVectorizer over one to three characters with Ridge.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from seeds import over_seeds

from data_prep.cli import main as sov_data
from data_prep.synth.difficulty.estimator import compared, load_estimator, reliability

WORDS = {"+": ("plus", "더하기"), "-": ("minus", "빼기"), "*": ("times", "곱하기")}
FORMS = (("What is {}?", "Compute {}.", "Find {}."), ("{}는 얼마인가?", "{} 값은?", "{}을 구하라."))
LENGTH, BATCH, NUM_ANSWERS, JUDGE_ERROR, HELD_OUT = 40, 96, 8, 0.15, 600
NUM_SEEDS = 3
PAD, END = 0, 1
CONFIGURATIONS = ((32, 0.4), (32, 1.0), (64, 0.3), (64, 0.6), (64, 1.0))
"""Width of a model, and the share of its training after which it answers."""


@dataclass(frozen=True)
class Problem:
    """A problem with its answer."""

    text: str
    answer: str
    language: str


@dataclass(frozen=True)
class Arm:
    """What an estimator is fitted to."""

    seed: int
    """Of the labels."""
    num_problems: int
    """With labels, of both languages."""
    num_pairs: int = 0
    """From the judge."""
    language: str = ""
    """Of the problems that are taken; empty: both."""

    def __str__(self) -> str:
        return f"{self.seed}-{self.num_problems}-{self.num_pairs}-{self.language or 'all'}"


def draw(rng: random.Random) -> Problem:
    """Return a problem: one or two operations on numbers of one or two digits."""
    language = rng.randrange(2)
    numbers = [rng.randrange(10 ** rng.randint(1, 2)) for _ in range(rng.choice((2, 2, 2, 3)))]
    operators = [rng.choice("++--*") for _ in numbers[1:]]
    value = eval("".join(f"{n}{o}" for n, o in zip(numbers, [*operators, ""], strict=True)))
    worded = rng.random() < 0.5
    parts = [str(numbers[0])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        parts += [WORDS[operator][language] if worded else operator, str(number)]
    return Problem(rng.choice(FORMS[language]).format(" ".join(parts)), str(value), ("en", "ko")[language])


class Model(nn.Module):
    """A transformer over characters."""

    def __init__(self, alphabet: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, alphabet)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, alphabet]."""
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.places[:length]
        mask: Tensor = self.mask  # type: ignore[assignment]
        return self.head(self.layers(hidden, mask=mask[:length, :length], is_causal=True))


def encoded(problems: Sequence[Problem], alphabet: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return tokens [n, LENGTH], and which of them are the answer's or its end."""
    tokens, answers = torch.zeros(len(problems), LENGTH, dtype=torch.long), torch.zeros(len(problems), LENGTH)
    for row, problem in enumerate(problems):
        ids = [alphabet[c] for c in problem.text + problem.answer] + [END]
        tokens[row, :len(ids)] = torch.tensor(ids)
        answers[row, len(problem.text):len(ids)] = 1
    return tokens, answers.bool()


def log_probabilities(model: nn.Module, tokens: Tensor, answers: Tensor) -> Tensor:
    """Return ln of the probability of each right answer."""
    logits = model(tokens[:, :-1]).log_softmax(-1)
    each = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    found: Tensor = (each * answers[:, 1:]).sum(-1)
    return found


def true_rates(problems: Sequence[Problem], alphabet: dict[str, int], steps: int, work: Path
               ) -> dict[str, np.ndarray]:
    """Train the models, but for those that are; return configuration -> the pass rate of each problem."""
    rates: dict[str, np.ndarray] = {}
    for width in sorted({width for width, _ in CONFIGURATIONS}):
        file = work / f"rates-{width}-{steps}-{len(problems)}.npz"
        if not file.exists():
            new = file.with_suffix(".new.npz")
            np.savez(new, **rates_of(width, problems, alphabet, steps))
            new.rename(file)
        with np.load(file) as found:
            rates |= {name: found[name] for name in found.files}
    return rates


def rates_of(width: int, problems: Sequence[Problem], alphabet: dict[str, int], steps: int
             ) -> dict[str, np.ndarray]:
    """Train one model; return each of its configurations -> the pass rate of each problem."""
    asked = encoded(problems, alphabet)
    taken = {problem.text for problem in problems}
    rates: dict[str, np.ndarray] = {}
    torch.manual_seed(width)
    rng, model = random.Random(width), Model(len(alphabet) + 2, width)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    stops = {round(share * steps): f"width {width}, {share:.0%} of training"
             for wide, share in CONFIGURATIONS if wide == width}
    for step in range(1, steps + 1):
        batch = [p for p in (draw(rng) for _ in range(BATCH + BATCH // 8)) if p.text not in taken][:BATCH]
        loss = -log_probabilities(model, *encoded(batch, alphabet)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in stops:
            with torch.inference_mode():
                parts = [log_probabilities(model, *(t[i:i + 512] for t in asked)).exp().numpy()
                         for i in range(0, len(problems), 512)]
            rates[stops[step]] = np.concatenate(parts).astype(float)
    return rates


def write_labels(folder: Path, problems: Sequence[Problem], rates: dict[str, np.ndarray],
                 chosen: Sequence[int], num_pairs: int, seed: int) -> list[str]:
    """Write what `synth answers` and `synth comparisons` would; return arguments of `difficulty label`."""
    rng = np.random.default_rng(seed)
    for number, values in enumerate(rates.values()):
        (folder / f"model-{number}").mkdir(parents=True, exist_ok=True)
        rows = [{"problem_id": f"p{i}", "prompt": problems[i].text, "num_answers": NUM_ANSWERS,
                 "num_right": int(rng.binomial(NUM_ANSWERS, min(values[i], 1.0)))} for i in chosen]
        (folder / f"model-{number}/kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = np.mean(list(rates.values()), axis=0)
    pairs = []
    while len(pairs) < num_pairs:
        one, other = rng.choice(chosen, 2, replace=False).tolist()
        if (mean[one] < mean[other]) != (rng.random() < JUDGE_ERROR):
            one, other = other, one
        pairs.append({"easier": f"p{one}", "harder": f"p{other}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return ["--answers", *(str(folder / f"model-{i}") for i in range(len(rates))),
            *(["--comparisons", str(folder / "pairs.jsonl")] if pairs else [])]


def estimator(folder: Path, arguments: Sequence[str]) -> Any:
    """Return the estimator that the commands make."""
    labels, model = str(folder / "labels"), str(folder / "model")
    for argv in (["difficulty", "label", *arguments, "--output", labels, "--overwrite"],
                 ["difficulty", "fit", "--labels", labels, "--output", model, "--overwrite"]):
        with contextlib.redirect_stdout(io.StringIO()):
            if sov_data(argv) != 0:
                raise SystemExit(f"failed: {argv}")
    return load_estimator(folder / "model")


def plain(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Return what TF-IDF of characters and ridge regression expect."""
    lines = (folder / "labels/problems.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3)), Ridge())
    model.fit([row["problem"] for row in rows], [row["pass_rate"] for row in rows])
    return np.clip(model.predict(texts), 0.0, 1.0)


def told(name: str, found: Sequence[dict[str, Any]]) -> str:
    """Return a line of figures over seeds."""
    return f"  {name:<58}" + "  ".join(
        f"{label} {over_seeds([row[key] for row in found], '.3f')}" for label, key in (
            ("Spearman", "spearman"), ("ECE", "calibration_error"), ("mean error", "mean_absolute_error")))


def measured(place: Path, problems: Sequence[Problem], rates: dict[str, np.ndarray], asked: Arm
             ) -> list[dict[str, Any]]:
    """Return figures of one arm, with the names of the lines that they belong to; they are kept in a file."""
    file = place / "figures.json"
    if file.exists():
        kept: list[dict[str, Any]] = json.loads(file.read_text())
        return kept
    chosen = [i for i in range(asked.num_problems) if asked.language in ("", problems[i].language)]
    judged = problems[-HELD_OUT:]
    texts, truth = [problem.text for problem in judged], np.mean(list(rates.values()), axis=0)[-HELD_OUT:]
    model = estimator(place, write_labels(place, problems, rates, chosen, asked.num_pairs, asked.seed))
    expected = np.array([model.pass_rate(text) for text in texts])
    what = f"{len(chosen)} problems" + (f", {asked.num_pairs} pairs" if asked.num_pairs else "") + (
        ", English alone" if asked.language else "")
    found = [{"line": f"difficulty, {what}", **compared(expected, truth)}]
    for name, code in (("English", "en"), ("Korean", "ko")):
        if not asked.num_pairs and code != asked.language:
            places = np.array([problem.language == code for problem in judged])
            found.append({"line": f"difficulty, {what}: on {name}",
                          **compared(expected[places], truth[places])})
    if not asked.num_pairs and not asked.language:
        found.append({"line": f"TF-IDF and ridge, {what}", **compared(plain(place, texts), truth)})
        found[0]["reliability"] = reliability(expected, truth)
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Expected against true pass rates.")
    parser.add_argument("--work", type=Path, required=True, help="folder; what is in it is not done again")
    parser.add_argument("--steps", type=int, default=400, help="of training of each model")
    parser.add_argument("--problems", type=int, default=800, help="with labels at most; 600 more judge")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rng = random.Random(7)
    drawn = {problem.text: problem for problem in (draw(rng) for _ in range(4 * args.problems))}
    problems = list(drawn.values())[:args.problems + HELD_OUT]
    letters = sorted({c for _ in range(20_000) for c in draw(rng).text + "-0123456789"})
    alphabet = {c: i + 2 for i, c in enumerate(letters)}
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    rates = true_rates(problems, alphabet, args.steps, args.work)
    print(f"{platform.platform()}, Python {platform.python_version()}, one thread")
    print(f"{len(problems)} problems, five configurations, {args.steps} steps of training each:")
    for name, values in rates.items():
        print(f"  {name:<32} mean pass rate {values.mean():.3f}, below 0.1: {(values < 0.1).mean():.0%}, "
              f"above 0.9: {(values > 0.9).mean():.0%}")
    lines: dict[str, list[dict[str, Any]]] = {}
    for seed in range(NUM_SEEDS):
        for arm in (Arm(seed, 150), Arm(seed, 150, 600), Arm(seed, 600), Arm(seed, args.problems),
                    Arm(seed, args.problems, 1200), Arm(seed, args.problems, 0, "en")):
            for row in measured(args.work / f"{args.steps}-{arm}", problems, rates, arm):
                lines.setdefault(row["line"], []).append(row)
    print(f"against the true rates of {HELD_OUT} problems, {NUM_SEEDS} draws of labels (mean and 95 % "
          "interval):")
    print("\n".join(told(name, found) for name, found in sorted(lines.items())))
    print(f"reliability with {args.problems} problems, the last draw: "
          "expected, problems, mean expected, mean true")
    for row in lines[f"difficulty, {args.problems} problems"][-1]["reliability"]:
        print(f"  {row['from']:.1f} to {row['to']:.1f}  {row['num_problems']:5}  {row['expected']:.3f}  "
              f"{row['measured']:.3f}")


if __name__ == "__main__":
    main()
