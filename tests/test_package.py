"""The wheel: what is in it, and that it works installed, away from this checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from modelscope_cnclip import __version__

ROOT = Path(__file__).parent.parent

CHECK = """
import json, sys
from importlib.metadata import entry_points, version
from importlib.resources import files

import modelscope_cnclip
import modelscope_cnclip.trainers
from modelscope_cnclip.towers import TowerConfig, configured_towers

data = files("modelscope_cnclip.configuration")
plugins = [point.load() for point in entry_points(group="modelscope_hub.cli_plugins") if point.name == "cnclip"]
print(json.dumps({
    "file": modelscope_cnclip.__file__,
    "version": version("modelscope-cnclip"),
    "towers": [name for name in configured_towers() if TowerConfig.named(name)],
    "vocab": (data / "vocab" / "chinese_bert.txt").read_text(encoding="utf-8").count("\\n"),
    "configuration": json.loads((data / "configuration.json").read_text())["task"],
    "tiny": len(modelscope_cnclip.Encoder.from_pretrained("tiny").encode_text("一只猫")[0]),
    "plugins": [plugin.__module__ for plugin in plugins],
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_everything_and_works_elsewhere(tmp_path: Path) -> None:
    source, dist, venv, empty = (tmp_path / name for name in ("source", "dist", "venv", "empty"))
    empty.mkdir()
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tmp*")
    shutil.copytree(ROOT, source, ignore=left_out)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source, cwd=empty)
    (wheel,) = dist.glob("*.whl")

    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name.removeprefix("modelscope_cnclip/") for name in names if name.startswith("modelscope_cnclip/")}
    shipped = {f"configuration/towers/{file.name}" for file in (ROOT / "configuration" / "towers").glob("*.json")}
    shipped |= {f"configuration/recipes/{file.name}" for file in (ROOT / "configuration" / "recipes").glob("*.json")}
    shipped |= {f"configuration/tiny/{file.name}" for file in (ROOT / "configuration" / "tiny").iterdir()}
    shipped |= {f"trainers/{file.name}" for file in (ROOT / "trainers").glob("*.py")}
    shipped |= {file.name for file in (ROOT / "modelscope_cnclip").glob("*.py")}
    assert {"trainers/__init__.py", "configuration/towers/vit-b-16.json", "encoder.py"} <= shipped
    assert {"configuration/recipes/two_stage.json", "configuration/tiny/model.safetensors"} <= shipped
    assert shipped | {"configuration/configuration.json", "configuration/vocab/chinese_bert.txt"} <= inside
    assert {Path(name).name for name in names if ".dist-info/licenses/" in name} >= {"LICENSE", "NOTICE"}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"modelscope_cnclip", f"modelscope_cnclip-{__version__}.dist-info"}
    assert not {name.split("/")[0] for name in inside} & {"tests", "examples", "benchmarks"}

    # Everything but our package comes from this Python's own site-packages, named in a .pth file. A directory that is
    # named there is only searched: the .pth files in it, and with them a checkout installed with -e, stay unread.
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=empty)
    python = next(path for path in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if path.exists())
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=empty)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=empty).strip())
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")

    found = json.loads(run(python, "-c", CHECK, cwd=empty).splitlines()[-1])
    assert Path(found["file"]).is_relative_to(packages)
    assert found["version"] == __version__
    assert {f"configuration/towers/{name}.json" for name in found["towers"]} <= shipped
    assert len(found["towers"]) >= 6
    assert found["vocab"] in (21127, 21128)  # with or without a line break at the end
    assert found["configuration"] == "multi-modal-embedding"
    assert found["tiny"] == 256
    assert found["plugins"] == ["modelscope_cnclip.cli"]
    cnclip = shutil.which("cnclip", path=str(python.parent))
    assert cnclip is not None
    assert __version__ in run(cnclip, "--version", cwd=empty)
