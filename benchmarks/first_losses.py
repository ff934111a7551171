"""Print hashes of the losses and the export of tiny recipes, to compare two versions of the code bit for bit.

    python benchmarks/first_losses.py --data runs/demo/text > losses.txt

Run the script before and after a change, on the same machine and build of torch, and compare the lines. Each
recipe trains 20 steps on the token shards that `make demo` writes, with `train.deterministic` and one thread
per process. The script only uses commands, so that it works after any move of modules. A line has the first
and the last loss, and a SHA-256 over the `repr` of all losses, which changes with a single bit. Then `convert
to-hf` exports the first run; its SHA-256 covers names and bytes of all files except manifest.json and
README.md, which contain the time and the digest of the checkpoint.
"""

import argparse
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from command_lines import format_settings, format_single_phase, run_command

STEPS = 20
RUNS = (("tiny-solar-open", 1, ()), ("tiny-k-exaone", 1, ()), ("tiny-qwen3", 1, ()),
        ("tiny-solar-open2", 1, ()), ("tiny-deepseek-v3", 1, ()), ("tiny-solar-open", 2, ("parallel.ep=2",)))
"""(recipe, processes, further settings). Together they have experts with a router bias, multi-token
prediction, dense layers, linear and latent attention, and experts on two processes."""
SETTINGS = (f"train.steps={STEPS}", "train.deterministic=true", "train.num_threads=1",
            "train.global_batch_size=8", "train.micro_batch_size=4", "train.eval_every_steps=0",
            "data.max_epochs=0", format_single_phase(256))
IGNORED_FILES = ("manifest.json", "README.md")
"""Files of an export that differ between two runs of one version."""


def read_losses(run_folder: Path) -> list[float]:
    """Return the loss of each step of a run, in order."""
    events = map(json.loads, (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def hash_losses(losses: Iterable[float]) -> str:
    """Return the SHA-256, in hexadecimal, of the exact values of losses."""
    return hashlib.sha256("\n".join(map(repr, losses)).encode()).hexdigest()


def hash_folder(folder: Path) -> tuple[str, list[str]]:
    """Return the SHA-256, in hexadecimal, of the names and bytes of an export's files, and the names."""
    digest, names = hashlib.sha256(), []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in IGNORED_FILES):
        content = file.read_bytes()
        names.append(file.relative_to(folder).as_posix())
        digest.update(f"{names[-1]} {len(content)}\n".encode() + content)
    return digest.hexdigest(), names


def main() -> None:
    """Train all recipes, export the first, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/text"), help="token shards")
    data = parser.parse_args().data.resolve()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}")
    print(f"{'recipe':<18} {'processes':>9} {'layout':<14} {'first':>9} {'last':>9}  SHA-256 of the losses")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, (recipe, nproc, layout) in enumerate(RUNS):
            folder = work / f"run-{number}"
            run_command(work / "log", "megatron_sov", "pretrain", recipe, "--data", data, "--run", folder,
                        "--nproc", str(nproc), *format_settings(*SETTINGS, *layout))
            losses = read_losses(folder)
            if len(losses) != STEPS:
                raise SystemExit(f"{recipe}: {len(losses)} losses in events.jsonl, expected {STEPS}")
            print(f"{recipe:<18} {nproc:>9} {' '.join(layout) or '-':<14} {losses[0]:>9.6f} "
                  f"{losses[-1]:>9.6f}  {hash_losses(losses)}", flush=True)
        run_command(work / "log", "megatron_sov", "convert", "to-hf", work / "run-0", work / "hf")
        digest, names = hash_folder(work / "hf")
        print(f"\n{RUNS[0][0]} as a Hugging Face folder: {digest}\n  files: {', '.join(names)}\n"
              f"  ignored, for their times and the checkpoint's digest: {', '.join(IGNORED_FILES)}")


if __name__ == "__main__":
    main()
