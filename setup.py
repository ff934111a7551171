"""Packaging of megatron-sov: `pip install -e .[dev] -c constraints.txt` (or `make setup`)."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DISTRIBUTED = runpy.run_path(str(ROOT / "megatron_sov/version.py"))
"""That file alone is run: its package may lack what it needs."""
DATA_FILES = ("j2", "css", "js", "json", "jsonl", "yaml", "sh", "sbatch", "md")

INSTALL_REQUIRES = [
    "torch>=2.11,<2.15",  # tried: 2.11 on a GPU, 2.13 of the lock, first losses and engine tests on 2.14
    "megatron-core==0.19.2",  # Python 3.11: docs/install.md
    "numpy",
    "cloudpickle",
    "numba",
    "psutil",
    "transformers>=5.23,<6",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "pyyaml!=6.0.4",  # of a key in two merged mappings (<<: [*a, *b]) it keeps b's value, against YAML
    "regex",
    "blake3",
    "safetensors",
    "tqdm",
    "jinja2",
    "pydantic>=2",
]

EXTRAS = {
    # Needs a CUDA toolchain and --no-build-isolation: docs/install.md.
    "gpu": ["transformer-engine[pytorch,core-cu13]==2.20.2"],
    # if-verifiable: the checks of the reward `ifeval`, pinned for the same reason as lm-eval below
    "rl": ["math-verify==0.9.0", "latex2sympy2_extended[antlr4_13_2]==1.11.0", "if-verifiable==0.1.2"],
    "judge": ["openai>=2", "httpx>=0.27"],
    # `sov-data run`: readers of pages, PDFs, web archives and encodings; mojibake, languages and phone
    # numbers (their data lie in the wheels, nothing is downloaded); scorers.
    "data": ["resiliparse>=2", "pypdfium2>=5", "warcio>=1.7", "charset-normalizer>=3", "ftfy>=6.3",
             "py3langid>=0.4", "phonenumbers>=9", "scikit-learn>=1.7"],
    # `sov-data synth`: its client; agreement of translations; `data` for the checks of all.
    "synth": ["openai>=2", "httpx>=0.27", "sacrebleu>=2.5", "py3langid>=0.4"],
    # `eval lm`: the harness; it is pinned, for its tasks and prompts are part of what a score means.
    "eval": ["lm-eval==0.4.13"],
    # `serve`, and `chat`, which asks it
    "serve": ["aiohttp>=3.11", "openai>=2", "httpx>=0.27"],
    # `megatron-sov map --ray`
    "ray": ["ray>=2.40"],
    # `obs.tensorboard`, `obs.wandb`
    "trackers": ["tensorboard", "wandb"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    # pictures and sounds: their readers, quantisers of tokenizers, blocks of the picture decoder, error rates
    "omni": ["pillow", "soundfile", "scipy", "diffusers>=0.42", "jiwer>=4"],
    # einops: imported by the plain kernels of flash-linear-attention that ours are compared with
    "dev": [
        "pytest>=8", "hypothesis", "allpairspy", "einops", "ruff", "isort>=9", "mypy", "setuptools>=77",
        "sentencepiece>=0.2", "protobuf", "tensorboard", "wandb", "types-tqdm", "types-psutil", "zstandard",
        "peft>=0.21.2",
        "math-verify==0.9.0", "latex2sympy2_extended[antlr4_13_2]==1.11.0", "openai>=2",
        "httpx>=0.27", "if-verifiable==0.1.2", "datatrove>=0.10,<0.11",
        "resiliparse>=2", "pypdfium2>=5", "warcio>=1.7", "charset-normalizer>=3", "ftfy>=6.3",
        "py3langid>=0.4", "phonenumbers>=9",
        "scikit-learn>=1.7", "sacrebleu>=2.5",
        "lm-eval==0.4.13", "accelerate>=1.10", "aiohttp>=3.11",
        "ray>=2.40",
        "pillow", "soundfile", "scipy", "diffusers>=0.42", "jiwer>=4",
        # measures and judges of media in benchmarks/omni
        "scikit-image", "pystoi", "pocketsphinx", "espeakng-loader",
        "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0",
    ],
}

# the libraries alone: pip would ask an index for our own name, which has none of ours
EXTRAS["all"] = sorted({line for name, lines in EXTRAS.items()
                        if name not in ("dev", "gpu", "docs", "inspect") for line in lines})

setup(
    name="megatron-sov",
    version=DISTRIBUTED["__version__"],
    description="Train your own language model on Megatron-Core, from raw text to a Hugging Face folder.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[
        pattern for package in DISTRIBUTED["OUR_PACKAGES"] for pattern in (package, f"{package}.*")]),
    package_data={"": [f"**/*.{ending}" for ending in DATA_FILES] + ["py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": [
        "megatron-sov=megatron_sov.cli:main", "sov-tokenizer=tokenizer.cli:main",
        "sov-data=data_prep.cli:main"]},
)
