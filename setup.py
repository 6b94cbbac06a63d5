"""Metadata, extras and entry points; maps ``configuration/`` and ``trainers/`` into the package."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "modelscope_cnclip/__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    # Bounds below are versions that the tests ran with; where the code that uses an extra isn't there yet, none is set.
    "openvino": ["openvino", "nncf"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "search": ["pymilvus[milvus_lite]"],
    "web": ["gradio>=6", "fastapi", "uvicorn"],
    "ray": ["ray[data]"],
    "oss": ["oss2>=2.19"],
    "train": ["tensorboard>=2.20", "matplotlib>=3.10"],
    "test": [
        "pytest>=8",
        "pytest-timeout",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "import-linter>=2",
        "build",
        "oss2>=2.19",
        "tensorboard>=2.20",
        "matplotlib>=3.10",
        "six",  # cn_clip imports it and doesn't ask for it
        "torchvision",
    ],
}

setup(
    name="modelscope-cnclip",
    version=VERSION,
    description="Chinese CLIP on ModelScope: image and text embeddings, two-stage training, evaluation, search",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["Chinese CLIP", "CN-CLIP", "ModelScope", "embedding", "multi-modal"],
    python_requires=">=3.10",
    packages=["modelscope_cnclip", "modelscope_cnclip.configuration", "modelscope_cnclip.trainers"],
    package_dir={
        "modelscope_cnclip": "modelscope_cnclip",
        "modelscope_cnclip.configuration": "configuration",
        "modelscope_cnclip.trainers": "trainers",
    },
    package_data={
        "modelscope_cnclip.configuration": ["*.json", "towers/*.json", "recipes/*.json", "tiny/*", "vocab/*"],
    },
    install_requires=[
        "modelscope[datasets]>=1.40",
        "torch>=2.6",
        "timm>=1.0.20",
        "transformers>=5",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "Pillow>=11",
        "numpy>=2",
        "requests>=2.31",
        "tqdm>=4.66",
        "pyarrow>=18",
        "PyYAML",  # modelscope.utils.config imports it and modelscope asks for it only in another extra
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["cnclip = modelscope_cnclip.cli:main"],
        "modelscope_hub.cli_plugins": ["cnclip = modelscope_cnclip.cli:ModelScopeCommand"],
    },
)
