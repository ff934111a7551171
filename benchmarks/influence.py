"""What published estimators of influence say about removed documents, beside what their removal does.

    PYTHONPATH=FOLDER python benchmarks/influence.py --work FOLDER [--seeds 0 1 2]

FOLDER of PYTHONPATH has kronfluence: pip install --no-deps --target FOLDER kronfluence einconv opt_einsum

A small model learns from paragraphs of twelve modules of Python's library, a source each.  The truth is
`megatron-sov counterfactual --without SOURCE`: the same run without them, and how much higher its loss is on
paragraphs of each module that nobody has learned (float64, transformers' model; a repetition with nothing
left out differs in no bit, so that all of the difference is theirs).  Beside it stand

  tracin      the sum over checkpoints of the rate times the product of both gradients (TracInCP, arXiv
              2002.08484)
  ekfac       an influence function at the last checkpoint, by kronfluence (arXiv 2308.03296): linear layers,
              its own damping
  less        the sum over checkpoints of the rate times the cosine of a paragraph's Adam update, by the
              run's own moments, and the gradient (arXiv 2402.04333; without its projection and its adapters)
  likeness    the cosine of mean last hidden states: no estimate of an effect, but often taken for one
  tokens      of the source: what needs no model

Told is Spearman's correlation over the twelve removals, the mean over the modules that are asked about: over
all, and without the removal of the asked module itself, which is easy to guess.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rl_kills import fork_command, warm_by
from scipy.stats import spearmanr
from seed_runs import SeedFolder, rows_of, words, write

from megatron_sov.audit import repeating
from megatron_sov.base.artifacts import new_artifact, read_manifest
from megatron_sov.checkpoint.sharded_tensors import TensorReader, TensorWriter, write_index
from megatron_sov.convert import to_hf
from megatron_sov.runs.checkpoints import KIND, MODEL, complete, settings_of, step_of
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.data.token_shards import open_sources

MODULES = ("argparse", "subprocess", "threading", "tarfile", "random", "platform", "inspect", "tempfile",
           "json.decoder", "zipfile", "datetime", "heapq")
PARAGRAPHS, CHARS = 15, 360
"""Of a module, a third of which are asked about and the others learned; their longest length."""
STEPS, EVERY, VOCAB_SIZE = 40, 10, 368
SETTINGS = (f"model.vocab_size={VOCAB_SIZE}", "model.hidden_size=64", "model.num_layers=2",
            "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
            "model.dense_ffn_dim=128", f"train.steps={STEPS}",
            f"train.checkpoint_every_steps={EVERY}", "train.keep_checkpoints=0", "train.eval_every_steps=0",
            "train.num_threads=1", "train.global_batch_size=8", "train.micro_batch_size=8",
            "data.max_epochs=0", "optim.warmup_steps=4", rows_of(64))
ESTIMATORS = ("tracin", "ekfac", "less", "likeness", "tokens")
Gradient = torch.Tensor
"""[parameters] float32."""


@dataclass(frozen=True)
class Texts:
    """Paragraphs as tokens."""

    learned: dict[str, list[torch.Tensor]]
    """Module -> [1, n] of each."""
    asked: dict[str, list[torch.Tensor]]


class InfluenceSeed(SeedFolder):
    """Data, run and removals of one seed."""

    @property
    def run(self) -> Path:
        """Return the run's folder."""
        return self.folder / "run"

    def do(self, *argv: str | Path) -> None:
        """Run a command of megatron-sov in a fork.

        Raises:
            SystemExit: it failed.
        """
        pid = fork_command([*map(str, argv)], self.log, self.folder / "imported")
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit(f"{argv[0]} ended with exit code {code}; see {self.log}")

    def train(self, shards: Path) -> None:
        """Train the run, and repeat it without each module, unless it is done."""
        if not (self.run / "complete.json").exists():
            self.do("pretrain", "tiny-qwen3", "--data", shards, "--run", self.run, "--resume",
                    *words((*SETTINGS, f"train.seed={self.seed}")))
            warm_by(self.folder / "imported")
        for number, module in enumerate(MODULES):
            if not (self.folder / module / "removal.json").exists():
                self.do("counterfactual", self.run, "--without", module, "--output", self.folder / module,
                        *(["--control"] if not number else []))

    def removed(self, module: str) -> Path:
        """Return the checkpoint that never read a module."""
        return Path(json.loads((self.folder / module / "removal.json").read_text())["checkpoint"])


def start_in_fork(command: Sequence[str], *, stdout: Any, **_: Any) -> SimpleNamespace:
    """Stand for `start_command`: a command of ours in a fork, which has imported all."""
    pid = fork_command(list(command[command.index("-m") + 2:]), Path(stdout.name))
    return SimpleNamespace(wait=lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def make_data(folder: Path) -> tuple[Path, Path]:
    """Pack paragraphs; returns the token shards of what is learned, and of what is asked."""
    learned, asked = folder / "learned", folder / "asked"
    if (asked / "manifest.json").exists():
        return learned, asked
    folder.mkdir(parents=True, exist_ok=True)
    inputs: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        source = inspect.getsource(importlib.import_module(module))
        paragraphs = [p[:CHARS] for p in source.split("\n\n") if len(p.strip()) > CHARS // 2]
        # evenly over the whole file; every third is asked about
        taken = paragraphs[::max(1, len(paragraphs) // PARAGRAPHS)][:PARAGRAPHS]
        learns = [text for i, text in enumerate(taken) if i % 3 != 2]
        for name, texts in (("asked", taken[2::3]), ("learned", learns)):
            write(file := folder / f"{name}-{module}.jsonl", [{"text": text} for text in texts])
            inputs[name].append(f"{module}={file}")
    _command("tokenizer", "train", "--preset", "solar-open", "--vocab-size", str(VOCAB_SIZE), "--output",
             str(folder / "tokenizer"), "--input", *(text.partition("=")[2] for text in inputs["learned"]))
    for name, target in (("learned", learned), ("asked", asked)):
        _command("data_prep", "pack", "--tokenizer", str(folder / "tokenizer"), "--heldout", "0", "--workers",
                 "1", "--output", str(target), "--input", *inputs[name])
    return learned, asked


def _command(program: str, *argv: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        code = importlib.import_module(f"{program}.cli").main(list(argv))
    if code:
        raise SystemExit(f"{program} {' '.join(argv)}: ended with exit code {code}")


def documents(shards: Path) -> dict[str, list[torch.Tensor]]:
    """Return the documents of each source, as rows of one."""
    found = {}
    for source in open_sources({str(shards): 1.0}, VOCAB_SIZE):
        shard = source.shard("train")
        lengths = np.asarray(shard.lengths[np.arange(len(shard.lengths))]).tolist()
        found[source.name] = [torch.tensor(shard.tokens(d, 0, n).astype(np.int64))[None]
                              for d, n in enumerate(lengths)]
    return found


def hf_model(checkpoint: Path, moments: str = "") -> Any:
    """Return transformers' model of a checkpoint, or one with the optimizer's moments for weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        if moments:
            checkpoint = _with_moments(checkpoint, moments, Path(folder) / "moments")
        to_hf(checkpoint, Path(folder) / "hf", "float32", workers=1)
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32).eval()


def _with_moments(checkpoint: Path, kind: str, target: Path) -> Path:
    manifest, moments = read_manifest(checkpoint), TensorReader(checkpoint, "optimizer")
    with new_artifact(target, KIND) as artifact:
        writer = TensorWriter(artifact.path, MODEL)
        for key in TensorReader(checkpoint).keys():  # noqa: SIM118  (it is no mapping)
            writer.add(key, moments.read(f"{kind}/{key}"))
        write_index(artifact.path, MODEL, [writer.finish()])
        artifact.settings, artifact.content = manifest.settings, manifest.content
        shutil.copytree(checkpoint / "tokenizer", artifact.path / "tokenizer")
    return target


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the sum of a document's losses, in nats."""
    logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")


def gradient(model: Any, texts: Sequence[torch.Tensor]) -> Gradient:
    """Return the gradient of the sum of losses over documents."""
    model.zero_grad()
    for ids in texts:
        loss_of(model, ids).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def asked_losses(checkpoint: Path, texts: Texts) -> np.ndarray:
    """Return [modules] nats a token on what is asked of each, in float64."""
    model = hf_model(checkpoint).double()
    with torch.no_grad():
        return np.array([sum(float(loss_of(model, ids)) for ids in texts.asked[name])
                         / sum(ids.shape[1] - 1 for ids in texts.asked[name]) for name in MODULES])


def by_checkpoints(run: Path, texts: Texts) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tracin and less: [removals, asked modules], larger where a removal should cost more."""
    config = settings_of(complete(run / "checkpoints")[-1])
    rates = {e["step"]: e["lr"] for e in read_events(run / "events.jsonl") if e["event"] == "step"}
    tracin, less = (np.zeros((len(MODULES), len(MODULES))) for _ in range(2))
    for checkpoint in complete(run / "checkpoints"):
        model, step = hf_model(checkpoint), step_of(checkpoint)
        first, second = (torch.cat([p.detach().flatten() for p in hf_model(checkpoint, kind).parameters()])
                         for kind in ("exp_avg", "exp_avg_sq"))
        b1, b2, eps = config.optim.beta1, config.optim.beta2, config.optim.eps
        asked = torch.stack([gradient(model, texts.asked[name]) for name in MODULES])
        unit = asked / asked.norm(dim=1, keepdim=True)
        for i, name in enumerate(MODULES):
            for ids in texts.learned[name]:
                g = gradient(model, [ids])
                tracin[i] += rates[step] * (asked @ g).numpy()
                g = g / (ids.shape[1] - 1)  # as a step of its own would have it
                update = ((b1 * first + (1 - b1) * g) / (1 - b1 ** (step + 1))
                          / (((b2 * second + (1 - b2) * g * g) / (1 - b2 ** (step + 1))).sqrt() + eps))
                less[i] += rates[step] * (unit @ (update / update.norm())).numpy()
    yield "tracin", tracin
    yield "less", less


def by_influence_functions(checkpoint: Path, texts: Texts, folder: Path) -> np.ndarray:
    """Return what kronfluence says, likewise."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Language(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(batch["ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                labels = drawn.masked_fill(labels == -100, -100)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> None:
            return None

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["labels"] != -100

    def rows(of: dict[str, list[torch.Tensor]]) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
        texts = [(i, ids[0]) for i, name in enumerate(MODULES) for ids in of[name]]
        longest = max(len(ids) for _, ids in texts)

        def padded(ids: torch.Tensor, value: int) -> torch.Tensor:
            return torch.nn.functional.pad(ids, (0, longest - len(ids)), value=value)

        return ([{"ids": padded(ids, 0), "labels": padded(ids, -100)} for _, ids in texts],
                [i for i, _ in texts])

    learned, of_learned = rows(texts.learned)
    asked, of_asked = rows(texts.asked)
    task = Language()
    analyzer = Analyzer("influence", prepare_model(hf_model(checkpoint), task), task, cpu=True,
                        output_dir=str(folder), disable_tqdm=True, disable_model_save=True)
    analyzer.fit_all_factors("ekfac", learned, per_device_batch_size=8, overwrite_output_dir=True,
                             factor_args=FactorArguments(strategy="ekfac"))
    analyzer.compute_pairwise_scores(
        "scores", "ekfac", asked, learned, per_device_query_batch_size=8, per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True)
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy()
    found = np.zeros((len(MODULES), len(MODULES)))
    np.add.at(found, (np.array(of_learned)[None, :], np.array(of_asked)[:, None]), scores)
    return found


def likeness(checkpoint: Path, texts: Texts) -> np.ndarray:
    """Return the cosines of mean last hidden states, likewise."""
    model = hf_model(checkpoint)

    def mean(documents_of: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            states = torch.cat([model(ids, output_hidden_states=True).hidden_states[-1][0]
                                for ids in documents_of]).mean(0)
        return states / states.norm()

    learned, asked = (torch.stack([mean(of[name]) for name in MODULES])
                      for of in (texts.learned, texts.asked))
    return np.asarray((learned @ asked.T).numpy())


def correlations(truth: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """Return the mean over asked modules of Spearman's correlation over removals: of all, and of those of
    other modules; both [removals, asked modules]."""
    others = [[i for i in range(len(truth)) if i != j] for j in range(len(truth))]
    return (statistics.mean(float(spearmanr(truth[:, j], said[:, j]).statistic) for j in range(len(truth))),
            statistics.mean(float(spearmanr(truth[rows, j], said[rows, j]).statistic)
                            for j, rows in enumerate(others)))


def measure(seed: InfluenceSeed, texts: Texts) -> dict[str, tuple[float, float]]:
    """Return the correlations of each estimator, and print what the removals did."""
    last = complete(seed.run / "checkpoints")[-1]
    whole = asked_losses(last, texts)
    truth = np.stack([asked_losses(seed.removed(name), texts) - whole for name in MODULES])
    control = json.loads((seed.folder / MODULES[0] / "removal.json").read_text())["control"]
    own, rest = np.diag(truth), truth[~np.eye(len(truth), dtype=bool)]
    print(f"seed {seed.seed}: {whole.mean():.3f} nats a token; without the asked module {own.mean():+.4f} "
          f"({own.min():+.4f} to {own.max():+.4f}), without another {rest.mean():+.4f} ({rest.min():+.4f} to "
          f"{rest.max():+.4f}); with nothing left out: {control}", flush=True)
    sizes = np.array([sum(ids.shape[1] for ids in texts.learned[name]) for name in MODULES], float)
    said = dict(by_checkpoints(seed.run, texts))
    said |= {"ekfac": by_influence_functions(last, texts, seed.folder / "kronfluence"),
             "likeness": likeness(last, texts), "tokens": np.repeat(sizes[:, None], len(sizes), 1)}
    found = {name: correlations(truth, said[name]) for name in ESTIMATORS}
    print("  " + ", ".join(f"{name} {both[0]:+.2f} ({both[1]:+.2f})" for name, both in found.items()),
          flush=True)
    return found


def main() -> None:
    """Do all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeating.start_command = start_in_fork  # type: ignore[assignment]
    learned, asked = make_data(args.work.absolute())
    texts = Texts(documents(learned), documents(asked))
    tokens = sum(ids.shape[1] for of in texts.learned.values() for ids in of)
    print(f"{platform.machine()}, Python {platform.python_version()}; {len(MODULES)} removals of "
          f"{PARAGRAPHS * 2 // 3} paragraphs, {tokens:,} tokens in all; {STEPS} steps of 512 tokens; "
          "Spearman's correlation (without the asked module itself)", flush=True)
    seeds = [InfluenceSeed(number, args.work.absolute()) for number in args.seeds]
    for seed in seeds:
        seed.folder.mkdir(parents=True, exist_ok=True)
        seed.train(learned)
    found = [measure(seed, texts) for seed in seeds]
    print(f"{'estimator':<10}{'mean':>8}{'others':>8}   of each seed")
    for name in ESTIMATORS:
        means = [statistics.mean(one[name][k] for one in found) for k in (0, 1)]
        print(f"{name:<10}{means[0]:>+8.2f}{means[1]:>+8.2f}   "
              f"{', '.join(f'{one[name][0]:+.2f} ({one[name][1]:+.2f})' for one in found)}")


if __name__ == "__main__":
    sys.exit(main())
