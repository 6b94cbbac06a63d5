"""What we enter into ModelScope's registries: names, laziness, and living beside the built-in modules.

The host's registries are one per process and importing us changes them, so whatever depends on the order of imports
runs in a Python of its own: three of them, each answering several questions.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from modelscope.utils.ast_utils import load_from_prebuilt
from modelscope.utils.import_utils import LazyImportModule
from modelscope.utils.registry import build_from_cfg

from modelscope_cnclip import registry

NAMES = [(entry, name) for entry in registry.TABLE for name in (entry.name, entry.builtin) if name]
IDS = [f"{entry.registry}-{entry.group}-{name}" for entry, name in NAMES]

# What each script starts with. The built-in pipeline's module needs packages that modelscope doesn't install; with
# these stubs the module itself and the preprocessors' module, both with their registrations, are the genuine ones.
PRELUDE = """
import importlib, importlib.machinery, json, sys, types

MODEL = "modelscope.models.multi_modal.clip.model"
PIPELINE = "modelscope.pipelines.multi_modal.multi_modal_embedding_pipeline"
STUBS = ("decord", "cv2", "librosa", "modelscope.preprocessors.ofa", "modelscope.preprocessors.ofa.utils",
         "modelscope.preprocessors.ofa.utils.collate", "modelscope.preprocessors.ofa.utils.constant",
         "modelscope.preprocessors.image", "modelscope.pipelines.cv.cmdssl_video_embedding_pipeline")
folder, answers = sys.argv[1], {}

class Stub(types.ModuleType):
    __path__, __all__ = [], []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

def attempt(name):
    try:
        importlib.import_module(name)
    except Exception as error:
        return [type(error).__name__, str(error)]

def attempt_stubbed(name):
    for stub in STUBS:
        sys.modules[stub] = Stub(stub)
        sys.modules[stub].__spec__ = importlib.machinery.ModuleSpec(stub, None)
    return attempt(name)

def built():
    from modelscope.models import Model
    from modelscope.pipelines import pipeline
    from modelscope.preprocessors.builder import build_preprocessor
    from modelscope.utils.config import ConfigDict
    preprocessor = ConfigDict(type="clip-preprocessor", model_dir=folder)
    made = {"model": Model.from_pretrained(folder), "pipeline": pipeline("multi-modal-embedding", model=folder),
            "preprocessor": build_preprocessor(preprocessor, "multi-modal")}
    made["retrieval"] = pipeline("image-text-retrieval", model=folder)
    return {what: type(it).__module__ for what, it in made.items()}
"""

OURS_FIRST = """
import modelscope
before = set(sys.modules)
import modelscope_cnclip
answers["loaded by us"] = sorted(set(sys.modules) - before)
answers["built"] = built()
answers["model module"] = attempt(MODEL)
answers["pipeline module"] = attempt(PIPELINE)
answers["pipeline module, stubbed"] = attempt_stubbed(PIPELINE)
answers["built-in class"] = sys.modules[PIPELINE].MultiModalEmbeddingPipeline.__module__
answers["built after that"] = built()
"""

BUILTIN_FIRST = """
answers["model module"] = attempt(MODEL)
answers["pipeline module"] = attempt(PIPELINE)
answers["pipeline module, stubbed"] = attempt_stubbed(PIPELINE)
from modelscope.models.builder import MODELS
answers["registered"] = MODELS.get("clip-multi-modal-embedding", "multi-modal-embedding").__module__
import modelscope_cnclip
answers["ours on top"] = attempt("modelscope_cnclip.pipelines")
answers["built"] = built()
"""

NO_TAKEOVER = """
from modelscope.utils.import_utils import LazyImportModule
before = dict(LazyImportModule.get_ast_index()["index"])
import modelscope_cnclip
after = LazyImportModule.get_ast_index()["index"]
answers["changed"] = [list(key) for key in before if before[key] != after.get(key)]
answers["added"] = [list(key) for key in after if key not in before]
from modelscope.models import Model
from modelscope.pipelines import pipeline
pipe = pipeline("multi-modal-embedding", model=folder, pipeline_name="cnclip-multi-modal-embedding")
answers["shape"] = pipe("一只猫")["text_embedding"].shape
answers["ours"] = [type(pipe).__module__, type(pipe.model).__module__, type(pipe.preprocessor).__module__]
answers["built-in name"] = type(Model.from_pretrained(folder)).__module__
answers["pipeline module"] = attempt_stubbed(PIPELINE)
"""

OURS = {
    "model": "modelscope_cnclip.model",
    "preprocessor": "modelscope_cnclip.preprocessor",
    "pipeline": "modelscope_cnclip.pipelines",
    "retrieval": "modelscope_cnclip.pipelines",
}


def run(script: str, folder: Path, target: Path, **environment: str) -> dict[str, Any]:
    """The script's ``answers``, from a Python of its own."""
    file = target / "script.py"
    file.write_text(f"{PRELUDE}{script}\nopen(sys.argv[2], 'w').write(json.dumps(answers))\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(file), str(folder), str(target / "answers.json")],
        cwd=target,
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((target / "answers.json").read_text())


@pytest.fixture(scope="module")
def ours_first(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(OURS_FIRST, model_folder, tmp_path_factory.mktemp("ours-first"))


@pytest.fixture(scope="module")
def builtin_first(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(BUILTIN_FIRST, model_folder, tmp_path_factory.mktemp("builtin-first"))


def builtin_index() -> dict[tuple[str, str, str], Any]:
    """What the host ships, read anew: the one in use has our names in it."""
    return load_from_prebuilt()["index"]


def test_our_own_names_are_no_built_in_names() -> None:
    taken = {(kind, name) for kind, _, name in builtin_index()}
    assert not taken & {(entry.registry, entry.name) for entry in registry.TABLE}
    assert all("cnclip" in entry.name.lower() for entry in registry.TABLE)


def test_the_names_we_answer_for_are_built_in_names() -> None:
    index = builtin_index()
    answered = [entry for entry in registry.TABLE if entry.builtin]
    assert len(answered) == 6
    for entry in answered:
        assert (entry.registry, entry.group, entry.builtin) in index


def test_no_name_stands_for_two_classes() -> None:
    keys = [(entry.registry, entry.group, name) for entry, name in NAMES]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("entry", "name"), NAMES, ids=IDS)
def test_the_host_builds_what_the_table_says(
    entry: registry.Entry, name: str, model_folder: Path, tmp_path: Path
) -> None:
    cls = getattr(importlib.import_module(f"modelscope_cnclip.{entry.module}"), entry.cls)
    kind = getattr(importlib.import_module(registry._HOMES[entry.registry]), entry.registry)
    arguments: dict[str, str] = {}  # hooks and metrics take none
    if entry.registry in ("MODELS", "PREPROCESSORS"):
        arguments = {"model_dir": str(model_folder)}
    elif entry.registry == "PIPELINES":
        arguments = {"model": str(model_folder)}
    elif entry.registry == "TRAINERS":
        recipe = tmp_path / "recipe.json"
        recipe.write_text('{"train": {"max_steps": 1}}')
        arguments = {"model": str(model_folder), "cfg_file": str(recipe), "work_dir": str(tmp_path / "work")}
    made = build_from_cfg({"type": name} | arguments, kind, group_key=entry.group)
    assert type(made) is cls
    assert LazyImportModule.get_ast_index()["index"][entry.registry, entry.group, name]["module"] == cls.__module__
    assert cls.group_key == entry.group


def test_installing_twice_changes_nothing() -> None:
    index = LazyImportModule.get_ast_index()["index"]
    before = dict(index)
    registry.install()
    assert index == before


def test_a_third_partys_registration_still_works(model_folder: Path) -> None:
    """Names that aren't ours behave in our groups as in any other: kept, found, and refused a second time."""
    from modelscope.models.builder import MODELS

    importlib.import_module("modelscope_cnclip.model")

    class Other:
        pass

    MODELS.register_module("multi-modal-embedding", "someone-elses", Other)
    try:
        assert MODELS.get("someone-elses", "multi-modal-embedding") is Other
        with pytest.raises(KeyError, match="already registered"):
            MODELS.register_module("multi-modal-embedding", "someone-elses", Other)
    finally:
        del MODELS.modules["multi-modal-embedding"]["someone-elses"]


def test_importing_us_loads_nothing_but_the_registry(ours_first: dict[str, Any]) -> None:
    loaded = {name.split(".")[0] for name in ours_first["loaded by us"]}
    assert not loaded & {"timm", "transformers", "datasets", "gradio", "ray", "tokenizers", "PIL", "numpy", "torch"}
    assert {name for name in ours_first["loaded by us"] if name.startswith("modelscope")} == {
        "modelscope_cnclip",
        "modelscope_cnclip.registry",
    }


def test_official_names_build_ours(ours_first: dict[str, Any], builtin_first: dict[str, Any]) -> None:
    """On a folder in the official layout, whoever was imported first, and after the built-in was imported too."""
    assert ours_first["built"] == ours_first["built after that"] == builtin_first["built"] == OURS
    assert builtin_first["registered"] == "modelscope.models.multi_modal.clip.model"
    assert builtin_first["ours on top"] is None


def test_the_built_in_model_imports_before_and_after_us(
    ours_first: dict[str, Any], builtin_first: dict[str, Any]
) -> None:
    assert ours_first["model module"] is builtin_first["model module"] is None


def test_the_built_in_pipeline_fails_no_differently_because_of_us(
    ours_first: dict[str, Any], builtin_first: dict[str, Any]
) -> None:
    """It fails by itself where its dependencies are missing: the same class and message with us and without."""
    assert ours_first["pipeline module"] == builtin_first["pipeline module"]


def test_the_built_in_pipeline_imports_where_its_dependencies_are(
    ours_first: dict[str, Any], builtin_first: dict[str, Any]
) -> None:
    assert ours_first["pipeline module, stubbed"] is builtin_first["pipeline module, stubbed"] is None
    assert ours_first["built-in class"].startswith("modelscope.pipelines.multi_modal.")


def test_takeover_can_be_turned_off(model_folder: Path, tmp_path: Path) -> None:
    answers = run(NO_TAKEOVER, model_folder, tmp_path, **{registry.TAKEOVER: "0"})
    assert answers["changed"] == []
    assert sorted(answers["added"]) == sorted([entry.registry, entry.group, entry.name] for entry in registry.TABLE)
    assert answers["ours"] == [OURS["pipeline"], OURS["model"], OURS["preprocessor"]]
    assert answers["shape"] == [1, 32]
    assert answers["built-in name"] == "modelscope.models.multi_modal.clip.model"
    assert answers["pipeline module"] is None


@pytest.mark.parametrize(
    ("value", "ours"),
    [("0", False), ("false", False), (" OFF ", False), ("no", False), ("1", True), ("", True), (None, True)],
)
def test_the_switch_reads_as_people_write_it(value: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv(registry.TAKEOVER, raising=False)
    else:
        monkeypatch.setenv(registry.TAKEOVER, value)
    assert registry.takes_over() is ours
