"""Chinese CLIP on ModelScope: ``import modelscope_cnclip`` makes the published code work, and fast.

import modelscope_cnclip                  # registers everything, loads no model code
from modelscope_cnclip import Encoder     # the direct way: see Encoder
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import registry

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .encoder import Encoder, ItemError
    from .hub import HubError
    from .images import ImageError
    from .towers import ChineseCLIP, TowerConfig

__version__ = "0.1.0"

_PUBLIC = {
    "ChineseCLIP": "towers",
    "CheckpointError": "checkpoint",
    "Encoder": "encoder",
    "HubError": "hub",
    "ImageError": "images",
    "ItemError": "encoder",
    "TowerConfig": "towers",
}
__all__ = [
    "CheckpointError",
    "ChineseCLIP",
    "Encoder",
    "HubError",
    "ImageError",
    "ItemError",
    "TowerConfig",
    "__version__",
]

registry.install()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
