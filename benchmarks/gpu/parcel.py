"""Pack the libraries and results that a GPU machine without internet needs into pieces of 40 MB.

Usage, here:  python benchmarks/gpu/parcel.py pack --output .parcel [--results DIR] [--sm 90] [--wheel FILE]
there:        python3 benchmarks/gpu/parcel.py unpack FOLDER --output ~/parcel

`--results` adds the folder of an earlier `first_contact.py --out`: the CPU rungs with their data and runs,
and compiled kernels. `--wheel` adds Transformer Engine's torch extension for the machine's Python and torch;
without it `unpack` compiles the extension there and prints the path of the wheel. docs/gpu.md has the steps.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIECE_BYTES = 40 << 20
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TRANSFORMER_ENGINE = "2.20.2"
ENGINE = tuple(f"{name}=={TRANSFORMER_ENGINE}" for name in ("transformer-engine", "transformer-engine-cu13"))
PACKAGES = ("megatron-core", "transformers", "tokenizers", "pydantic", "pydantic-core", "annotated-types",
            "blake3", "importlib-metadata", "nvdlfw-inspect")
"""Packages that an image with torch, numpy and safetensors lacks, in the versions of constraints.txt."""
EXTENSION = f"transformer-engine-torch=={TRANSFORMER_ENGINE}"
MANIFEST, CARRIED = "manifest.json", ("events.jsonl", "caches.tar.xz", "work")
FATBIN, FATBIN_HEADER, FATBIN_ENTRY = 0xBA55ED50, struct.Struct("<IHHQ"), struct.Struct("<HHIQ12xI")
"""Magic number of an archive of GPU programs, its header (magic, version, header bytes, content bytes), and
the start of an entry (kind, version, header bytes, program bytes, compute capability as in sm_90)."""


def pack(output: Path, results: Path | None, sm: int, wheels: list[Path]) -> None:
    """Write the pieces and their manifest to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        install([*ENGINE, *list_pinned_packages()], site, *[f"--platform={name}" for name in PLATFORMS],
                f"--python-version={PYTHON}", "--implementation=cp", "--only-binary=:all:")
        for library in site.rglob("libtransformer_engine*.so"):
            cleared = clear_other_programs(library, sm)
            print(f"{library.name}: cleared {cleared / 2**20:.0f} MiB of programs for other GPUs")
        archive = Path(folder) / "parcel.tar.xz"
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(site, "site")
            for wheel in wheels or [download_extension(Path(folder))]:
                tar.add(wheel, f"extension/{wheel.name}")
            for name in CARRIED if results else ():
                assert results is not None
                if (results / name).exists():
                    tar.add(results / name, f"results/{name}")
        split(archive, output)


def list_pinned_packages() -> list[str]:
    """Return `PACKAGES` with the versions of constraints.txt, if it has them."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
                if "==" in line)
    names = {name.replace("_", "-").lower(): version for name, version in pins.items()}
    return [f"{name}=={names[name]}" if name in names else name for name in PACKAGES]


def install(packages: list[str], target: Path, *options: str) -> None:
    """Install packages without their requirements into a folder."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target",
                    str(target), *options, *packages], check=True)


def download_extension(folder: Path) -> Path:
    """Return the sources of Transformer Engine's torch extension."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation",
                    "--no-binary=:all:", "-d", str(folder), EXTENSION], check=True)
    return next(folder.glob("transformer_engine_torch*"))


def clear_other_programs(library: Path, sm: int) -> int:
    """Fill the programs for other compute capabilities with zeros, which compress to nothing; the
    driver reads only the programs of its GPU. Return the number of cleared bytes."""
    content = bytearray(library.read_bytes())
    cleared = 0
    for start, size, capability in find_programs(content):
        if capability != sm:
            content[start:start + size] = bytes(size)
            cleared += size
    library.write_bytes(content)
    return cleared


def find_programs(content: bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield (start, bytes, compute capability) of each GPU program in a library."""
    magic = struct.pack("<I", FATBIN)
    place = content.find(magic)
    while place >= 0:
        _, version, header_bytes, num_bytes = FATBIN_HEADER.unpack_from(content, place)
        end = place + header_bytes + num_bytes
        if (version, header_bytes) != (1, FATBIN_HEADER.size) or end > len(content):  # not an archive
            place = content.find(magic, place + 1)
            continue
        entry = place + header_bytes
        while entry < end:
            _, _, entry_bytes, program_bytes, capability = FATBIN_ENTRY.unpack_from(content, entry)
            yield entry + entry_bytes, program_bytes, capability
            entry += entry_bytes + program_bytes
        place = content.find(magic, end)


def split(archive: Path, output: Path) -> None:
    """Write pieces of an archive, and a manifest with their hashes."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    hashes: dict[str, str] = {}
    with archive.open("rb") as file:
        while content := file.read(PIECE_BYTES):
            name = f"piece-{len(hashes):02}"
            (output / name).write_bytes(content)
            hashes[name] = hashlib.sha256(content).hexdigest()
    (output / MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    print(f"{archive.stat().st_size / 2**20:.0f} MiB in {len(hashes)} pieces: {output}")


def unpack(folder: Path, output: Path) -> None:
    """Join the pieces, install the libraries, and print the command that uses them.

    Raises:
        SystemExit: a piece is missing or damaged.
    """
    hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as archive:
        for name, expected in sorted(hashes.items()):
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                sys.exit(f"{folder / name}: missing or damaged; carry this piece again")
            archive.write(content)
        archive.seek(0)
        with tarfile.open(fileobj=archive, mode="r:xz") as tar:
            tar.extractall(output, filter="data")
    if (caches := output / "results/caches.tar.xz").is_file():
        with tarfile.open(caches) as tar:
            tar.extractall(output / "results/work", filter="data")
    [extension] = (output / "extension").iterdir()
    if extension.suffix == ".gz":
        extension = compile_extension(extension, output)
    install([str(extension)], output / "site", "--no-index")
    results = output / "results"
    print(f"export PYTHONPATH={output / 'site'}\n"
          f"python3 benchmarks/gpu/first_contact.py --out $OUT --minutes 9 --work {results / 'work'}"
          + f" --carry {results / 'events.jsonl'}" * (results / "events.jsonl").is_file())


def compile_extension(sources: Path, output: Path) -> Path:
    """Compile Transformer Engine's torch extension, and return its wheel, which the next parcel can carry."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index",
                    "--no-build-isolation", "-w", str(output / "wheels"), str(sources)], check=True,
                   env=os.environ | {"MAX_JOBS": str(os.cpu_count()), "PYTHONPATH": str(output / "site")})
    [wheel] = (output / "wheels").iterdir()
    print(f"compiled: {wheel}; copy it into $OUT, and give it to `pack --wheel`")
    return wheel


def main() -> None:
    """Run `pack` or `unpack`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing, unpacking = commands.add_parser("pack"), commands.add_parser("unpack")
    packing.add_argument("--results", type=Path, help="folder of an earlier first_contact.py --out")
    packing.add_argument("--sm", type=int, default=90, help="90: Hopper, 100: Blackwell")
    packing.add_argument("--wheel", type=Path, action="append", default=[], help="compiled torch extension")
    unpacking.add_argument("folder", type=Path, help="folder with all pieces and the manifest")
    for command in (packing, unpacking):
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.output, args.results, args.sm, args.wheel)
    else:
        unpack(args.folder, args.output.expanduser().resolve())


if __name__ == "__main__":
    main()
