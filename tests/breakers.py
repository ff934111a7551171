"""Broken command inputs: arguments, files, folders and weights."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import FileRecord

HOSTILE = ("", " ", "-1", "0", "1", "1e99", "nan", "inf", "-0.0", "9" * 40, "x" * 5000, "é한\u2028", "a\nb",
           "..", "/", "/dev/null", "/proc/self/mem", "/proc/x", "/proc/nowhere/at/all", "[" * 3000, "{",
           "null", "true", "=", "a=b", "a=b=c", ":", "x:", "@out:nan", "--", "-", "\udcff", "%s%n", "{{1/0}}",
           "org/name", "train.steps=nan", "train.steps=1e30",
           "train.stepz=1", "model.num_layers=-3", "parallel.tp=7",
           "model.num_experts=99999999", "data.phases=[[]]", "data.phases=[{}]", "optim.lr=[]", "model=3")
LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 0.5, -2.5, 1e300, 10 ** 30, "", "x", "../../etc/passwd", "/etc/passwd",
    [], [[]], [0], {}, {"a": 1}, "\x1b[2J", "9" * 50, float("nan"), 2 ** 31, 2 ** 63)
TENSORS = "tensor: "
"""How a sentence on a broken tensor begins."""


def flip_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value, itself left out."""
    children = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, child in children.items():
        yield (*path, key)
        yield from leaves(child, (*path, key))


def break_json(file: Path, rng: random.Random) -> str:
    """Change type or size of one value of a JSON file, or delete it."""
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
        change = "left out"
    else:
        parent[last] = rng.choice(LEAVES)
        change = repr(parent[last])[:60]
    file.write_text(json.dumps(value))
    return f"{'.'.join(map(str, [*way, last]))} {change}"


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


def change_quietly(file: Path, rng: random.Random) -> str:
    """Change bits without changing size and modification time."""
    before, content = file.stat(), bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 8) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return "other content of the same size and time"


def break_tensors(file: Path, rng: random.Random) -> str:
    """Leave a tensor of a safetensors file out, or give it another name or shape."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = rng.choice(("left out", "renamed", "cut", "longer", "flat", "swapped"))
    if how == "renamed":
        tensors[rng.choice((f"{name}.x", f"x.{name}", name[1:], name.upper(), "model"))] = tensor
    elif how != "left out":
        tensors[name] = {"cut": lambda: tensor[:-1] if tensor.ndim else tensor[None],
                         "longer": lambda: tensor.reshape(1, *tensor.shape),
                         "flat": lambda: tensor.flatten() if tensor.ndim > 1 else tensor[:0],
                         "swapped": lambda: tensor.T if len(set(tensor.shape)) > 1 else tensor[:1]}[
                             how]().contiguous()
    save_file(tensors, file, metadata=metadata)
    return f"{TENSORS}{name} {how}"


def add_a_stranger(root: Path, rng: random.Random) -> str:
    """Add a file that the command did not write."""
    folder = rng.choice(sorted([root, *(p for p in root.rglob("*") if p.is_dir())]))
    name = rng.choice(("README.md", "notes.json", "notes.jsonl", ".hidden", "loop", "outside", "nowhere",
                       "pipe"))
    at = folder / name
    if at.exists():
        return f"{at.name} was there"
    if name in ("loop", "outside", "nowhere"):
        at.symlink_to({"loop": str(folder), "outside": "/etc", "nowhere": "/proc/nowhere/at/all"}[name])
    elif name == "pipe":
        os.mkfifo(at)
    else:
        at.write_text({"notes.json": '{"text": 3}', "notes.jsonl": '{"a": 1}\n'}.get(name, "# Notes\n"))
    return f"{at.relative_to(root.parent)}: a stranger"


def update_manifest_hash(folder: Path, file: Path) -> None:
    """Rewrite the hash of a file in the nearest manifest above it."""
    for above in file.parents:
        manifest = above / "manifest.json"
        if manifest.is_file() and file.is_file():
            try:
                record = json.loads(manifest.read_text())
                result = record["files"].get(file.relative_to(above).as_posix())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return  # this file itself was broken
            if isinstance(result, dict):
                result.update(vars(FileRecord.of(file)))
                manifest.write_text(json.dumps(record))
        if above == folder:
            return


def list_files(root: Path) -> list[Path]:
    """The files of an input, itself or in it."""
    return sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]


def break_a_file(places: dict[str, Path], rng: random.Random) -> str:
    """Damage one file of the inputs; return the file and a description of the damage."""
    name = rng.choice(sorted(places))
    root = places[name]
    if root.is_dir() and rng.random() < 0.12:
        return add_a_stranger(root, rng)
    files = list_files(root)
    texts, weights = ([f for f in files if f.suffix == end] for end in (".json", ".safetensors"))
    file = rng.choice(weights if weights and rng.random() < 0.2 else
                      texts if texts and rng.random() < 0.6 else files)
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        how = break_tensors
    elif file.suffix == ".json" and rng.random() < 0.8:
        how = break_json
    else:
        how = change_quietly if rng.random() < 0.1 else break_bytes
    change = how(file, rng)
    if rng.random() < 0.8:
        update_manifest_hash(root.parent, file)
    return f"{file.relative_to(root.parent)}: {change}"


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
