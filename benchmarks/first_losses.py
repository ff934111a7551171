"""Print hashes of the losses and the export of tiny recipes, to compare two versions of the code bit for bit.

    python benchmarks/first_losses.py --data runs/demo/text > losses.txt

Each recipe trains 20 steps on the token shards that `make demo` writes, with `train.deterministic` and one
thread per process. Only the command line is used, so the script works after any move of modules. A line has
the first and the last loss and a SHA-256 over the `repr` of all losses, which changes with a single bit. Then
`convert to-hf` exports the first run; its SHA-256 covers names and bytes of all files except manifest.json
and README.md, which contain the time and the digest of the checkpoint.

Run it before and after a change, on the same machine and build of torch, and compare the lines.
"""

import argparse
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from seed_runs import rows_of, run, words

STEPS = 20
RUNS = (("tiny-solar-open", 1, ()), ("tiny-k-exaone", 1, ()), ("tiny-qwen3", 1, ()),
        ("tiny-solar-open2", 1, ()), ("tiny-deepseek-v3", 1, ()), ("tiny-solar-open", 2, ("parallel.ep=2",)))
"""(recipe, processes, further settings). Together they have experts with a router bias, multi-token
prediction, dense layers, linear and latent attention, and experts on two processes."""
SETTINGS = (f"train.steps={STEPS}", "train.deterministic=true", "train.num_threads=1",
            "train.global_batch_size=8", "train.micro_batch_size=4", "train.eval_every_steps=0",
            "data.max_epochs=0", rows_of(256))
LEFT_OUT = ("manifest.json", "README.md")
"""Files of an export that differ between two runs of one version."""


def losses_of(run_folder: Path) -> list[float]:
    """Return the loss of each step of a run, in order."""
    events = map(json.loads, (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def digest_of_losses(losses: Iterable[float]) -> str:
    """Return the SHA-256, in hexadecimal, of the exact values of losses."""
    return hashlib.sha256("\n".join(map(repr, losses)).encode()).hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Return the SHA-256, in hexadecimal, of the names and bytes of an export's files in name order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in LEFT_OUT):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def main() -> None:
    """Train all recipes, export the first, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/text"), help="token shards")
    data = parser.parse_args().data.resolve()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}")
    print(f"{'recipe':<18} {'processes':>9} {'layout':<14} {'first':>9} {'last':>9}  SHA-256 of the losses")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, (recipe, nproc, more) in enumerate(RUNS):
            folder = work / f"run-{number}"
            run(work / "log", "megatron_sov", "pretrain", recipe, "--data", data, "--run", folder, "--nproc",
                str(nproc), *words((*SETTINGS, *more)))
            losses = losses_of(folder)
            if len(losses) != STEPS:
                raise SystemExit(f"{recipe}: {len(losses)} losses in events.jsonl, expected {STEPS}")
            print(f"{recipe:<18} {nproc:>9} {' '.join(more) or '-':<14} {losses[0]:>9.6f} "
                  f"{losses[-1]:>9.6f}  {digest_of_losses(losses)}", flush=True)
        run(work / "log", "megatron_sov", "convert", "to-hf", work / "run-0", work / "hf")
        files = sorted(p.relative_to(work / "hf").as_posix() for p in (work / "hf").rglob("*") if p.is_file())
        print(f"\n{RUNS[0][0]} as a Hugging Face folder: {digest_of_folder(work / 'hf')}")
        print(f"  files: {', '.join(f for f in files if Path(f).name not in LEFT_OUT)}")
        print(f"  left out, for its time and the checkpoint's digest: {', '.join(LEFT_OUT)}")


if __name__ == "__main__":
    main()
