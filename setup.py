"""Packaging of megatron-sov: `pip install -e .[dev] -c constraints.txt` (or `make setup`)."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = ["megatron_sov", "tokenizer", "data_prep"]

VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_sov/version.py").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION, "megatron_sov/version.py: has no line __version__ = \"...\""

INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core==0.16.1",
    "numpy",
    "psutil",
    "transformers>=5.23,<6",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "pyyaml",
    "regex",
    "zstandard",
    "safetensors",
    "tqdm",
    "plotly",
    "jinja2",
    "pydantic>=2",
]

EXTRAS = {
    # Needs a CUDA toolchain and --no-build-isolation: docs/install.md.
    "gpu": ["transformer-engine[pytorch,core-cu13]==2.20.2"],
    "rollout": ["vllm"],
    "omni": ["pillow", "soundfile"],
    "sentencepiece": ["sentencepiece>=0.2", "protobuf"],
    "dev": [
        "pytest>=8", "pytest-xdist", "hypothesis", "allpairspy", "ruff", "mypy", "setuptools>=77",
        "sentencepiece>=0.2", "protobuf", "tensorboard", "wandb", "types-tqdm", "types-psutil",
    ],
}

setup(
    name="megatron-sov",
    version=VERSION.group(1),
    description="Train your own language model on Megatron-Core, from raw text to a Hugging Face folder.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={"": [f"**/*.{ending}" for ending in ("j2", "css", "js", "json", "yaml", "sh", "sbatch")] + ["py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "megatron-sov=megatron_sov.cli:main",
            "sov-tokenizer=tokenizer.cli:main",
            "sov-data=data_prep.cli:main",
        ],
    },
)
