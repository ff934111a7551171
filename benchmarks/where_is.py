"""How many folders it takes to find things in this repository by their names: twenty questions.

    python benchmarks/where_is.py > benchmarks/results/where_is.txt

The questions were written down before the tree was known.  For each, one person went from the top by `ls`
alone, without a search, a page or a file's text, to the folder whose name promised most, and on until the
file was open that holds the answer.  ROUTES has the folders as they were listed, wrong turns with them; the
listing of the top counts nothing, and a folder that an earlier question had shown counts again.  The count is
by hand; the script adds it up, and refuses a route with a folder or a file that its tree has not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

BEFORE = "da74cf8c"
"""The revision before the halls."""
ROOT = Path(__file__).parents[1]
M = "megatron_sov"
ROUTES = [
    ("how is GRPO's loss computed", f"{M} post post/rl post/parts: policy_loss.py",
     f"{M} post post/rl: ../policy.py"),
    ("where is FP8 switched on", f"{M} config: quantization.py",
     f"{M} engine engine/model: gpu_settings.py"),
    ("what decides the order of samples", f"{M} data: order.py", f"{M} train train/data: order.py"),
    ("what happens on SIGTERM", f"{M} train: stopping.py", f"{M} train: stopping.py"),
    ("how is a tokenizer exported", "tokenizer tokenizer/formats: export_command.py",
     "tokenizer tokenizer/formats: commands.py"),
    ("where is a checkpoint written", f"{M} train mcore mcore/checkpoint: save.py",
     f"{M} checkpoint: save.py"),
    ("where is the learning-rate schedule", f"{M} train mcore mcore/optimizer config: schedules.py",
     f"{M}: schedules.py"),
    ("where is the needle test", f"{M} eval eval/needle: suite.py", f"{M} eval eval/needle: suite.py"),
    ("where do near duplicates go", "data_prep data_prep/dedup: minhash.py",
     "data_prep data_prep/curate data_prep/curate/dedup: minhash.py"),
    ("where is decontamination", "data_prep data_prep/decontamination: step.py",
     "data_prep data_prep/curate data_prep/curate/decontamination: step.py"),
    ("where does code of a model run", f"{M} rewards rewards/sandbox: sandbox.py",
     f"{M} sandbox: sandbox.py"),
    ("where is the router's auxiliary loss", f"{M} models mcore mcore/model: router.py",
     f"{M} model engine: router.py"),
    ("where are chat templates applied", f"tokenizer {M} chat: template.py",
     f"tokenizer {M} chat: template.py"),
    ("how does LoRA become a PEFT folder", f"{M} convert: peft.py", f"{M} convert: peft.py"),
    ("what does a run cost", f"{M} plan: pricing.py", f"{M} plan: pricing.py"),
    ("where are templates for Slurm", "slurm slurm/templates: training.sbatch.j2",
     "slurm slurm/templates: training.sbatch.j2"),
    ("where are rollouts stored", f"{M} rollouts: store.py", f"{M} rollouts: store.py"),
    ("how is DPO's loss computed", f"{M} post post/parts: preferences.py", f"{M} post: preference.py"),
    ("where are the report's charts drawn", f"{M} report: charts.py",
     f"{M} publish publish/report: charts.py"),
    ("where is the mixture of data decided", "data_prep data_prep/mixture: fitting.py",
     "data_prep data_prep/mixture: fitting.py"),
]
"""Question; then, before and now, the folders below `megatron_sov` in the order listed, and the file."""
AT_FIRST = {
    "where is FP8 switched on": f"{M} engine engine/mcore engine/mcore/model: gpu_settings.py",
    "where is a checkpoint written": f"{M} train engine engine/mcore engine/mcore/checkpoint: save.py",
    "where is the learning-rate schedule":
        f"{M} train engine engine/mcore engine/mcore/optimizer model model/config: schedules.py",
    "where is the router's auxiliary loss": f"{M} model engine engine/mcore engine/mcore/model: router.py",
    "what decides the order of samples": f"{M} train engine engine/data: order.py",
    "where does code of a model run": f"{M} judge judge/rewards work work/sandbox: sandbox.py",
    "where are chat templates applied": f"tokenizer {M} base base/chat: template.py",
    "how does LoRA become a PEFT folder": f"{M} post publish engine engine/convert: peft.py",
    "where are rollouts stored": f"{M} post post/rl judge judge/rollouts: store.py",
}
"""Questions whose answers were moved after the count, and their routes in the revision HALLS.
Their new routes were counted by those who had moved the files."""
HALLS = "b6fbff32"
MOST = 3


def found(route: str, revision: str) -> tuple[int, str]:
    """Return how many folders a route lists, and the file at its end."""
    listed, _, file = route.partition(": ")
    folders = [f if f == M or f.split("/")[0] in ("data_prep", "tokenizer", "slurm") else f"{M}/{f}"
               for f in listed.split()]
    above, name = (1, file[3:]) if file.startswith("../") else (0, file)
    end = "/".join([*folders[-1].split("/")[:-above or None], name])
    for path in [*folders, end]:
        there = (ROOT / path).exists() if not revision else subprocess.run(
            ["git", "cat-file", "-e", f"{revision}:{path}"], cwd=ROOT, check=False).returncode == 0
        if not there:
            raise SystemExit(f"where_is: {path} is not in {revision or 'the work tree'}")
    return len(folders), end.removeprefix(f"{M}/")


def main() -> None:
    """Print the table."""
    rows = [(question, *found(before, BEFORE),
             found(AT_FIRST[question], HALLS)[0] if question in AT_FIRST else found(now, "")[0],
             *found(now, "")) for question, before, now in ROUTES]
    print("Twenty questions, the folders listed to reach the file that answers, wrong turns with them.\n"
          f"Before: {BEFORE}. At first: {HALLS}, the halls as they were counted. Now: after moves.\n"
          "One person counted, by hand, once; routes that moves changed were counted again, by those who\n"
          "moved the files. Files below megatron_sov are named without it.\n")
    print(f"{'question':<38}{'before':>6}  {'file':<37}{'at first':>8}{'now':>5}  file")
    for question, before, old, first, now, new in rows:
        print(f"{question:<38}{before:>6}  {old:<37}{first:>8}{now:>5}  {new}")
    for when, counts in (("before", [row[1] for row in rows]), ("at first", [row[3] for row in rows]),
                         ("now", [row[4] for row in rows])):
        many = sum(count > MOST for count in counts)
        print(f"\n{when}: {sum(counts)} folders in all, at most {max(counts)}; more than {MOST} for "
              f"{many} of {len(counts)} questions", end="")
    print()


if __name__ == "__main__":
    main()
