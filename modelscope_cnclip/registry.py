"""Every name that we register in ModelScope, or answer for in place of a built-in: one table and one loop.

:func:`install` runs on ``import modelscope_cnclip``. It writes the table into the host's AST index, which maps a name
to the module that holds it; a module of ours is imported when the host first builds something from it, and its
classes then enter the host's registries through :func:`register`. So an import registers everything and loads nothing.

``MODELSCOPE_CNCLIP_TAKEOVER=0`` leaves the built-in names alone; ours (the ones with ``cnclip``) stay.

Seen on modelscope 1.40.2: ``register_module(force=True)`` alone can't replace a built-in, for the index still sends
the host to the built-in's module, whose own registration then fails. Hence the index; and see :class:`_Group`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

TAKEOVER = "MODELSCOPE_CNCLIP_TAKEOVER"
RECALL = "cnclip-retrieval-recall"


@dataclass(frozen=True)
class Entry:
    """One class of ours under its names in one group of one of the host's registries."""

    registry: str  # as the AST index writes it
    group: str
    name: str
    builtin: str | None  # the built-in's name that we answer for
    module: str
    cls: str


TABLE = (
    Entry("MODELS", "multi-modal-embedding", "cnclip", "clip-multi-modal-embedding", "model", "CnclipModel"),
    Entry(
        "PREPROCESSORS", "multi-modal", "cnclip-preprocessor", "clip-preprocessor", "preprocessor", "CnclipPreprocessor"
    ),
    Entry(
        "PIPELINES",
        "multi-modal-embedding",
        "cnclip-multi-modal-embedding",
        "multi-modal-embedding",
        "pipelines",
        "MultiModalEmbeddingPipeline",
    ),
    Entry(
        "PIPELINES",
        "image-text-retrieval",
        "cnclip-image-text-retrieval",
        "multi-modal-embedding",
        "pipelines",
        "ImageTextRetrievalPipeline",
    ),
    Entry("TRAINERS", "default", "cnclip-trainer", "clip-multi-modal-embedding", "trainers.trainer", "CnclipTrainer"),
    Entry("METRICS", "default", RECALL, None, "trainers.evaluation", "RetrievalRecallMetric"),
    Entry("HOOKS", "default", "CnclipTwoStageHook", None, "trainers.two_stage", "CnclipTwoStageHook"),
    Entry("HOOKS", "default", "CnclipCheckpointHook", None, "trainers.checkpointing", "CnclipCheckpointHook"),
    Entry("HOOKS", "default", "CnclipEvaluationHook", None, "trainers.evaluation", "CnclipEvaluationHook"),
    Entry("HOOKS", "default", "CnclipLogHook", None, "trainers.logs", "CnclipLogHook"),
    Entry(
        "HOOKS",
        "default",
        "CnclipClampLogitScaleHook",
        "ClipClampLogitScaleHook",
        "trainers.two_stage",
        "CnclipClampLogitScaleHook",
    ),
)

# Where the host keeps each registry object.
_HOMES = {
    "MODELS": "modelscope.models.builder",
    "PREPROCESSORS": "modelscope.preprocessors.builder",
    "PIPELINES": "modelscope.pipelines.builder",
    "TRAINERS": "modelscope.trainers.builder",
    "HOOKS": "modelscope.trainers.hooks.builder",
    "METRICS": "modelscope.metrics.builder",
}


def takes_over() -> bool:
    """Whether the built-in names are ours."""
    return os.environ.get(TAKEOVER, "1").strip().lower() not in ("0", "false", "no", "off")


def install() -> None:
    """Tell the host where our names live. Loads none of our modules; safe to call twice."""
    from modelscope.utils.import_utils import LazyImportModule

    index = LazyImportModule.get_ast_index()["index"]
    for entry in TABLE:
        place = {"filepath": "", "imports": [], "module": f"{__package__}.{entry.module}"}
        for name in _names(entry):
            index[entry.registry, entry.group, name] = place


def register(cls: T) -> T:
    """Class decorator: enter a class into the host's registries under every name the table gives it."""
    for entry in TABLE:
        if (f"{__package__}.{entry.module}", entry.cls) == (cls.__module__, cls.__name__):
            modules = getattr(importlib.import_module(_HOMES[entry.registry]), entry.registry).modules
            group = modules.get(entry.group, {})
            if not isinstance(group, _Group):
                group = modules[entry.group] = _Group(group)
            for name in _names(entry):
                group.claim(name, cls)
    return cls


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry.name, entry.builtin) if entry.builtin and takes_over() else (entry.name,)


class _Group(dict):
    """A registry group in which our names stay ours.

    A built-in's decorator raises if its name is taken. Someone who imports the built-in module by hand, before or
    after us, would see that error because of us; here its registration passes and has no effect.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__(group)
        self._ours: set[str] = set()

    def claim(self, name: str, cls: type) -> None:
        self._ours.add(name)
        super().__setitem__(name, cls)

    def __contains__(self, name: object) -> bool:
        return name not in self._ours and super().__contains__(name)

    def __setitem__(self, name: str, cls: Any) -> None:
        if name not in self._ours:
            super().__setitem__(name, cls)
