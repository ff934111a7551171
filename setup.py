"""Packaging of megatron-sov: `pip install -e .[dev] -c constraints.txt` (or `make setup`)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def constants(file: Path) -> dict[str, Any]:
    """Return the plain values that a module assigns; it is read and not imported,
    for its package may lack what it needs."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value)
            for node in body if isinstance(node, ast.Assign)}


DISTRIBUTED = constants(ROOT / "megatron_sov/version.py")
DATA_FILES = ("j2", "css", "js", "json", "yaml", "sh", "sbatch", "md")

INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core==0.16.1",
    "numpy",
    "cloudpickle",
    "numba",
    "psutil",
    "transformers>=5.23,<6",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "pyyaml",
    "regex",
    "zstandard",
    "blake3",
    "safetensors",
    "shtab",
    "tqdm",
    "plotly",
    "jinja2",
    "pydantic>=2",
]

EXTRAS = {
    # Needs a CUDA toolchain and --no-build-isolation: docs/install.md.
    "gpu": ["transformer-engine[pytorch,core-cu13]==2.20.2"],
    "rollout": ["vllm"],
    "rl": ["math-verify==0.9.0", "latex2sympy2_extended[antlr4_13_2]==1.11.0"],
    "judge": ["openai>=2", "httpx>=0.27"],
    # `sov-data run`: readers of pages, books, offices, PDFs, web archives, licences, encodings;
    # languages and phone numbers (their data lie in the wheels, nothing is downloaded); scorers.
    "data": ["resiliparse>=2", "lxml>=5", "pypdfium2>=5", "warcio>=1.7", "identify>=2.6",
             "ukkonen>=1.0", "charset-normalizer>=3", "py3langid>=0.4", "phonenumbers>=9",
             "scikit-learn>=1.7"],
    # `sov-data synth`: its client; graphs of facts, agreement of translations; `data` for the checks of all.
    "synth": ["openai>=2", "httpx>=0.27", "networkx>=3", "sacrebleu>=2.5", "py3langid>=0.4"],
    # `eval lm`: the harness; it is pinned, for its tasks and prompts are part of what a score means.
    "eval": ["lm-eval==0.4.13"],
    # `serve`
    "serve": ["aiohttp>=3.11"],
    "telemetry": ["opentelemetry-sdk>=1.40", "opentelemetry-exporter-otlp-proto-http>=1.40",
                  "prometheus-client>=0.26", "nvidia-ml-py>=13"],
    # `megatron-sov map --ray`
    "ray": ["ray>=2.40"],
    # `obs.tensorboard`, `obs.wandb`
    "trackers": ["tensorboard", "wandb"],
    # `obs.mlflow`
    "mlflow": ["mlflow-skinny>=3.1"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    # pictures and sounds: their readers, quantisers of tokenizers, blocks of the picture decoder, error rates
    "omni": ["pillow", "soundfile", "vector-quantize-pytorch>=1.32", "diffusers>=0.42", "jiwer>=4"],
    "sentencepiece": ["sentencepiece>=0.2", "protobuf"],
    "dev": [
        "pytest>=8", "pytest-xdist", "hypothesis", "allpairspy", "ruff", "isort>=9", "mypy", "setuptools>=77",
        "sentencepiece>=0.2", "protobuf", "tensorboard", "wandb", "types-tqdm", "types-psutil",
        "peft>=0.21.2",
        "math-verify==0.9.0", "latex2sympy2_extended[antlr4_13_2]==1.11.0", "openai>=2",
        "httpx>=0.27", "langdetect>=1.0.9", "datatrove>=0.10,<0.11",
        "resiliparse>=2", "lxml>=5", "pypdfium2>=5", "warcio>=1.7", "identify>=2.6", "ukkonen>=1.0",
        "charset-normalizer>=3",
        "py3langid>=0.4", "phonenumbers>=9",
        "scikit-learn>=1.7", "networkx>=3", "sacrebleu>=2.5",
        "lm-eval==0.4.13", "accelerate>=1.10", "aiohttp>=3.11",
        "opentelemetry-sdk>=1.40", "opentelemetry-exporter-otlp-proto-http>=1.40", "prometheus-client>=0.26",
        "nvidia-ml-py>=13", "mlflow-skinny>=3.1", "ray>=2.40",
        "pillow", "soundfile", "vector-quantize-pytorch>=1.32", "diffusers>=0.42", "jiwer>=4",
        # measures and judges of media in benchmarks/omni
        "scikit-image", "pystoi", "pocketsphinx", "espeakng-loader",
        "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0",
    ],
}

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
    entry_points={
        "console_scripts": [
            "megatron-sov=megatron_sov.cli:main",
            "sov-tokenizer=tokenizer.cli:main",
            "sov-data=data_prep.cli:main",
        ],
    },
)
