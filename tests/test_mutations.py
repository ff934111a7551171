"""Whatever stands on a command line or in the files it names, a command ends with a sentence and one of the
exit codes that scripts know: no traceback, no endless work, nothing half-made.

Each case takes a sound command, breaks one argument or one file of its inputs (whose manifest is often
hashed again, as an attacker would), and runs it.  SOV_MUTATIONS=N tries N cases of each command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.artifacts import FileRecord

COUNT = int(os.environ.get("SOV_MUTATIONS", "1"))
TIMEOUT_S = 120.0
SMALL = ("--set", "train.steps=2", "--set", "train.global_batch_size=2", "--set", "train.micro_batch_size=1",
         "--set", 'data.phases=[{"name": "main", "seq_len": 32}]', "--set", "model.hidden_size=32",
         "--set", "model.num_layers=2", "--set", "model.head_dim=8", "--set", "model.expert_ffn_dim=16",
         "--set", "model.vocab_size=368", "--set", "data.heldout_tokens=64", "--set", "train.max_restarts=0")
TRAIN = ("tiny-solar-open", "--run", "@out", "--nproc", "1", *SMALL)
M, D, T = "megatron-sov", "sov-data", "sov-tokenizer"
COMMANDS: dict[str, tuple[str, ...]] = {
    "pretrain": (M, "pretrain", *TRAIN, "--data", "@text"),
    "pretrain --resume": (M, "pretrain", "tiny-solar-open", "--run", "@run", "--nproc", "1", *SMALL,
                          "--data", "@text", "--resume"),
    "pretrain --from": (M, "pretrain", *TRAIN, "--data", "@text", "--from", "@run"),
    "pretrain from hf": (M, "pretrain", *TRAIN, "--data", "@text", "--from", "@hf"),
    "sft": (M, "sft", *TRAIN, "--data", "@chats", "--from", "@run"),
    "extend": (M, "extend", *TRAIN, "--data", "@text", "--from", "@run"),
    "to-hf": (M, "convert", "to-hf", "@run", "@out", "--workers", "1"),
    "from-hf": (M, "convert", "from-hf", "@hf", "@out", "--workers", "1"),
    "verify": (M, "convert", "verify", "@run", "@hf", "--workers", "1", "--lengths", "8"),
    "inspect": (M, "convert", "inspect", "@run", "--json"),
    "inspect hf": (M, "convert", "inspect", "@hf"),
    "generate": (M, "generate", "@run", "--prompts", "@prompts", "--max-new-tokens", "4", "--nproc", "1"),
    "generate --chat": (M, "generate", "@hf", "--prompt", "hello", "--chat", "--max-new-tokens", "4",
                        "--temperature", "0.5", "--top-k", "5", "--stop", "x"),
    "eval ppl": (M, "eval", "ppl", "@run", "--data", "@text", "--seq-len", "32", "--max-tokens", "64",
                 "--nproc", "1", "--out", "@out"),
    "eval ppl of hf": (M, "eval", "ppl", "@hf", "--data", "@text", "--seq-len", "32", "--max-tokens", "64"),
    "eval bigram": (M, "eval", "bigram", "--data", "@text", "--max-tokens", "64", "--seq-len", "32"),
    "eval needle": (M, "eval", "needle", "@run", "--data", "@text", "--lengths", "64", "--depths", "0.5",
                    "--samples", "1", "--kinds", "single", "--nproc", "1", "--out", "@out"),
    "eval logits": (M, "eval", "logits", "@run", "@hf", "--lengths", "8", "--nproc", "1"),
    "submit": (M, "submit", "pretrain", "--cluster", "@cluster", "--nodes", "1", "--dry-run", *TRAIN,
               "--data", "@text"),
    "submit chain": (M, "submit", "chain", "@chain", "--dry-run"),
    "status": (M, "status", "@run", "--json"),
    "logs": (M, "logs", "@run", "--tail", "5", "--grep", "step"),
    "plan": (M, "plan", "tiny-solar-open", *SMALL, "--nproc", "2", "--json"),
    "plan of a file": (M, "plan", "--config", "@config", "--json"),
    "report": (M, "report", "@run", "--out", "@out"),
    "recipes": (M, "recipes", "tiny-solar-open", *SMALL, "--json"),
    "pack": (D, "pack", "--tokenizer", "@tokenizer", "--input", "@documents", "--output", "@out",
             "--heldout", "0.1", "--workers", "1", "--max-document-bytes", "10000", "--shard-tokens", "500"),
    "pack chats": (D, "pack", "--tokenizer", "@tokenizer", "--input", "@messages", "--output", "@out",
                   "--format", "chat", "--workers", "1", "--on-bad", "quarantine"),
    "mix": (D, "mix", "--output", "@out", "@text:0.5", "@chats:0.5"),
    "inspect tokens": (D, "inspect", "@text"),
    "stats": (D, "stats", "@chats", "--json"),
    "sample": (D, "sample", "@text", "--source", "even", "--count", "2", "--max-tokens", "20", "--seed", "1"),
    "verify tokens": (D, "verify", "@text", "--tokens", "1000", "--blend", "even=0.5,odd=0.5"),
    "train": (T, "train", "--preset", "solar-open", "--vocab-size", "300", "--input", "@documents",
              "--output", "@out", "--workers", "1", "--max-memory-gb", "2"),
    "train superwords": (T, "train", "--preset", "k-exaone", "--vocab-size", "400", "--input", "@documents",
                         "--output", "@out", "--workers", "1", "--superword-share", "0.2"),
    "import": (T, "import", "@hf", "--output", "@out", "--text", "@documents"),
    "import ranks": (T, "import", "@ranks", "--rules", "@rules", "--output", "@out"),
    "export": (T, "export", "@tokenizer", "--format", "tiktoken", "--output", "@out"),
    "graft": (T, "graft", "@hf", "--add", "@words", "--output", "@out"),
    "compare": (T, "compare", "@tokenizer", "@hf", "--text", "@documents", "--max-text-mb", "0.01",
                "--json", "@out"),
}
HOSTILE = ("", " ", "-1", "0", "1", "1e99", "nan", "inf", "-0.0", "9" * 40, "x" * 5000, "é한\u2028", "a\nb",
           "..", "/", "/dev/null", "/proc/self/mem", "/proc/x", "/nowhere/at/all", "[" * 3000, "{", "null",
           "true", "=", "a=b", "a=b=c", ":", "x:", "@out:nan", "--", "-", "\udcff", "%s%n", "{{1/0}}",
           "org/name", "train.steps=nan", "train.steps=1e30",
           "train.stepz=1", "model.num_layers=-3", "parallel.tp=7",
           "model.num_experts=99999999", "data.phases=[[]]", "data.phases=[{}]", "optim.lr=[]", "model=3")
LEAVES = (None, True, False, 0, -1, 1, 3, 0.5, -2.5, 1e300, 10 ** 30, "", "x", "../../etc/passwd",
          "/etc/passwd", [], [[]], [0], {}, {"a": 1}, "\x1b[2J", "9" * 50, float("nan"), 2 ** 31, 2 ** 63)


@dataclass(frozen=True)
class World:
    """Sound inputs of every kind, copied for each case: name -> path."""

    places: dict[str, Path]

    def copied(self, names: list[str], folder: Path) -> dict[str, Path]:
        """Return copies of some inputs, which a case may break."""
        copies = {}
        for name in names:
            source, target = self.places[name], folder / self.places[name].name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy(source, target)
            copies[name] = target
        return copies


@pytest.fixture(scope="module")
def world(packed_data: Any, run_command: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Token shards, a run with a checkpoint, its Hugging Face folder, texts and settings, all tiny."""
    folder = tmp_path_factory.mktemp("sound")
    run, hf = folder / "run", folder / "hf"
    done = run_command("pretrain", "tiny-solar-open", "--run", str(run), "--nproc", "1", *SMALL,
                       "--data", str(packed_data.text))
    assert done.returncode == 0, done.stderr
    done = run_command("convert", "to-hf", str(run), str(hf))
    assert done.returncode == 0, done.stderr
    done = run_command("export", str(packed_data.tokenizer), "--format", "tiktoken", "--output",
                       str(folder / "ranks.tiktoken"), program=T)
    assert done.returncode == 0, done.stderr
    for name, text in {
            "prompts.jsonl": '{"prompt": "Chapter 1"}\n{"prompt": "water"}\n',
            "words.txt": "mountain\nriver\n",
            "config.json": (run / "config.json").read_text()}.items():
        (folder / name).write_text(text)
    for kind, name in (("clusters", "local"), ("chains", "tiny-solar-open")):
        shutil.copy(Path(__file__).parents[1] / "slurm" / kind / f"{name}.yaml", folder / f"{kind}.yaml")
    data = packed_data.text.parent
    (rules,) = folder.glob("ranks*.json")
    here = {"ranks": "ranks.tiktoken", "prompts": "prompts.jsonl", "words": "words.txt",
            "config": "config.json", "cluster": "clusters.yaml", "chain": "chains.yaml"}
    return World({
        "text": packed_data.text, "chats": packed_data.chats, "tokenizer": packed_data.tokenizer, "run": run,
        "hf": hf, "documents": data / "even.jsonl", "messages": data / "chat.jsonl", "rules": rules,
        **{kind: folder / name for kind, name in here.items()}})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value, itself left out."""
    children = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, child in children.items():
        yield (*path, key)
        yield from leaves(child, (*path, key))


def break_json(file: Path, rng: random.Random) -> str:
    """Give one value of a JSON file another kind or size, or take it away."""
    value = json.loads(file.read_text())
    places = list(leaves(value))
    if not places:
        file.write_text("[]")
        return "is []"
    *way, last = rng.choice(places)
    parent = value
    for key in way:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[last]
        told = "left out"
    else:
        parent[last] = rng.choice(LEAVES)
        told = repr(parent[last])[:60]
    file.write_text(json.dumps(value))
    return f"{'.'.join(map(str, [*way, last]))} {told}"


def break_bytes(file: Path, rng: random.Random) -> str:
    """Damage a file as disks, transfers and attackers do."""
    content = bytearray(file.read_bytes())
    how = rng.choice(("cut", "empty", "flip", "noise", "longer", "nested", "gone", "folder", "loop", "twice"))
    if how in ("gone", "folder", "loop"):
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "loop":
            file.symlink_to(file)
        return how
    if how == "flip" and content:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    changed = {"cut": content[:rng.randrange(len(content) + 1)], "empty": b"", "flip": content,
               "noise": rng.randbytes(200), "longer": content + rng.randbytes(64), "nested": b"[" * 100_000,
               "twice": content + content}[how]
    file.write_bytes(bytes(changed))
    return how


def sign(folder: Path, file: Path) -> None:
    """Let the manifest next above a file hash it as it is now."""
    for above in file.parents:
        manifest = above / "manifest.json"
        if manifest.is_file() and file.is_file():
            try:
                record = json.loads(manifest.read_text())
                found = record["files"].get(file.relative_to(above).as_posix())
            except (ValueError, KeyError, TypeError, AttributeError):
                return  # it is what was broken
            if isinstance(found, dict):
                found.update(vars(FileRecord.of(file)))
                manifest.write_text(json.dumps(record))
        if above == folder:
            return


def break_a_file(places: dict[str, Path], rng: random.Random) -> str:
    """Break one file of the inputs; returns which, and how."""
    name = rng.choice(sorted(places))
    root = places[name]
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    texts = [f for f in files if f.suffix == ".json"]
    file = rng.choice(texts if texts and rng.random() < 0.6 else files)
    told = (break_json if file.suffix == ".json" and rng.random() < 0.8 else break_bytes)(file, rng)
    if rng.random() < 0.8:
        sign(root.parent, file)
    return f"{file.relative_to(root.parent)}: {told}"


def break_an_argument(argv: list[str], rng: random.Random) -> str:
    """Put another value, take an argument away, or give one more."""
    at = rng.randrange(1, len(argv))
    how = rng.random()
    if how < 0.75:
        argv[at] = rng.choice(HOSTILE)
    elif how < 0.85:
        del argv[at]
    elif how < 0.95:
        argv.insert(at, rng.choice(HOSTILE))
    else:
        argv[at:at] = ["--set", rng.choice(HOSTILE)]
    return f"argument {at}"


def one_sentence(stderr: str) -> bool:
    """Whether a refusal says what is wrong, and is no stack of calls."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return "Traceback" not in stderr and any("error: " in line or line.startswith("gate: ") for line in lines)


def cases() -> list[tuple[str, int]]:
    """Every command with its numbers of cases."""
    return [(name, number) for name in COMMANDS for number in range(COUNT)]


@pytest.mark.parametrize(("name", "number"), cases(), ids=lambda value: str(value).replace(" ", "_"))
def test_a_broken_command_ends_with_a_sentence(
        name: str, number: int, world: World, run_command: Callable[..., Any], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"{name} {number}")
    template = COMMANDS[name]
    used = [n for n in world.places if any(a == f"@{n}" or a.startswith(f"@{n}:") for a in template)]
    (tmp_path / "in").mkdir()
    places = world.copied(used, tmp_path / "in")
    by_file = bool(places) and rng.random() < 0.5
    said = break_a_file(places, rng) if by_file else ""
    program, *argv = template
    if not by_file:
        said = break_an_argument(argv, rng)
    out = tmp_path / "out"
    targets = {**{n: str(p) for n, p in places.items()}, "out": str(out)}
    for at, argument in enumerate(argv):
        key, colon, rest = argument.removeprefix("@").partition(":")
        if argument.startswith("@") and key in targets:
            argv[at] = targets[key] + colon + rest
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run_command(*argv, program=program, timeout_s=TIMEOUT_S)
    told = (f"{said}\n{program} {' '.join(a[:80] for a in argv)}\nexit code {done.returncode}\n"
            f"{done.stderr[-3000:]}")
    assert done.returncode in (0, 2, 3, 75), told
    assert "Traceback" not in done.stderr, told
    if done.returncode == 2:
        assert one_sentence(done.stderr), told
    if done.returncode == 2 and "run" not in used:
        assert not out.exists(), f"something was left behind\n{told}"
