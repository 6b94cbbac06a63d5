"""``cnclip`` as its users call it: what it writes, what it prints and where, and with which exit code it ends."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from modelscope_cnclip import __version__, checkpoint, cli
from modelscope_cnclip.encoder import Encoder

Run = Callable[..., tuple[int, str, str]]

CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("encode", …)`` -> (exit code, stdout, stderr)."""

    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as end:  # argparse's own
            code = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def encode(run: Run, model_folder: Path, tmp_path: Path) -> Run:
    """``cnclip encode`` with the tiny ViT, into ``out.npy``."""
    return lambda *argv: run("encode", *argv, "--model", model_folder, *CPU, "--to", tmp_path / "out.npy")


def one_line(err: str) -> str:
    """The last line on stderr, which is one of ours; before it there may be lines that skip items."""
    *before, last = err.rstrip("\n").split("\n")
    assert last.startswith("cnclip: ")
    assert all(line.startswith("cnclip: ") for line in before), err
    return last


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"cnclip {__version__}\n", "")


@pytest.mark.parametrize("argv", [["--help"], ["encode", "--help"], ["convert", "--help"]])
def test_help(argv: list[str], run: Run) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: cnclip")
    assert ("encode" in out) or ("--to" in out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "VERB"),
        (["dance"], "invalid choice: 'dance'"),
        (["encode"], "INPUT"),
        (["encode", "a.png"], "--to"),
        (["encode", "a.png", "--to", "x.npy", "--kind", "sounds"], "'sounds'"),
        (["encode", "a.png", "--to", "x.npy", "--batch-size", "0"], "0: must be 1 or more"),
        (["encode", "a.png", "--to", "x.npy", "--batch-size", "many"], "many"),
        (["encode", "a.png", "--to", "x.npy", "--manifest", "csv"], "'csv'"),
        (["convert", "a", "b"], "--to"),
        (["convert", "a", "b", "--to", "onnx"], "'onnx'"),
    ],
)
def test_usage_errors(argv: list[str], says: str, run: Run) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: cnclip")
    assert says in err


def test_a_folder_of_pictures(encode: Run, encoder: Encoder, pictures: list[Path], tmp_path: Path) -> None:
    code, out, err = encode(pictures[0].parent)
    files = f"{tmp_path / 'out.npy'} (12 × 32) and {tmp_path / 'out.parquet'}"
    assert (code, out, err) == (0, f"12 images -> {files}\n", "")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode_image(pictures), atol=1e-6)
    assert pq.read_table(tmp_path / "out.parquet")["source"].to_pylist() == [str(path) for path in pictures]


def test_pictures_in_every_other_form(encode: Run, encoder: Encoder, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(map(str, pictures[:2])), encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": str(pictures[2]), "image_id": 7}), encoding="utf-8")
    body = base64.b64encode(pictures[3].read_bytes()).decode()
    (tmp_path / "x_imgs.tsv").write_text(f"9\t{body}\n", encoding="utf-8")
    glob = f"{pictures[4].parent}/{pictures[4].stem[:-1]}[{pictures[4].stem[-1]}].png"
    uri = f"data:image/png;base64,{base64.b64encode(pictures[5].read_bytes()).decode()}"
    inputs = [*(tmp_path / name for name in ("list.txt", "x.jsonl", "x_imgs.tsv")), glob, uri]
    code, out, _ = encode(*inputs, "--kind", "images", "--manifest", "jsonl", "--batch-size", 2)
    assert code == 0
    assert out.startswith("6 images -> ")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode_image(pictures[:6]), atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows[:5]] == [*map(str, pictures[:2]), "7", "9", str(pictures[4])]
    assert rows[3]["source"] == f"{tmp_path}/x_imgs.tsv:1"


TEXTS = ["一只猫", "一条狗在草地上跑", "“引号”"]


@pytest.mark.parametrize("form", ["txt", "jsonl", "tsv", "stdin", "arguments"])
def test_texts(form: str, encode: Run, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kind = tmp_path / f"x.{form}", ["--kind", "texts"]
    ids = ["1", "2", "3"]
    if form == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
        inputs, kind = [file], []
    elif form == "tsv":
        ids = ["a", "7", "007"]
        file.write_text("".join(f"{key}\t{text}\n" for key, text in zip(ids, TEXTS)), encoding="utf-8")
        inputs = [file]
    elif form == "arguments":
        ids = ["0", "1", "2"]
        inputs = TEXTS
    else:
        file.write_text("\n".join(TEXTS), encoding="utf-8")
        inputs, kind = ([file], []) if form == "txt" else (["-"], kind)
    with file.open("w+" if form == "arguments" else "r") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        code, out, err = encode(*inputs, *kind)
    assert (code, err) == (0, "")
    assert out.startswith("3 texts -> ")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode_text(TEXTS), atol=1e-6)
    manifest = pq.read_table(tmp_path / "out.parquet")
    assert manifest["text"].to_pylist() == TEXTS
    assert manifest["id"].to_pylist() == ids


def test_kind_decides_what_a_list_holds(encode: Run, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{pictures[0]}\n", encoding="utf-8")
    for kind in ("texts", "images"):
        code, out, _ = encode(tmp_path / "x.txt", "--kind", kind)
        assert code == 0
        assert out.startswith(f"1 {kind[:-1]} -> ")


def test_kind_that_cannot_be_told(encode: Run) -> None:
    code, out, err = encode("一只猫")
    assert (code, out) == (2, "")
    assert one_line(err) == "cnclip: 一只猫: pictures or texts? Say which with --kind"


def test_json_is_one_document(encode: Run, pictures: list[Path], tmp_path: Path) -> None:
    code, out, _ = encode(*pictures[:2], tmp_path / "gone.png", "--json")
    assert code == 0
    values = json.loads(out)
    assert out.count("\n") == 1
    assert values.pop("seconds") >= 0
    assert values == {
        "vectors": str(tmp_path / "out.npy"), "manifest": str(tmp_path / "out.parquet"), "rows": 2, "skipped": 1,
        "dim": 32, "model": values["model"], "backend": "torch", "precision": "fp32", "device": "cpu",
    }  # fmt: skip


def test_bad_items_are_skipped_and_counted(encode: Run, pictures: list[Path], tmp_path: Path) -> None:
    lines = [json.dumps({"image": str(pictures[0])}), "{oops", '{"image": "gone.png"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code, out, err = encode(tmp_path / "x.jsonl")
    assert code == 0
    assert out.startswith("1 image -> ")
    assert out.endswith("; 2 skipped\n")
    assert one_line(err).startswith(f"cnclip: skipped {tmp_path}/x.jsonl:2: not a JSON object")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"image": "gone.png"}\n', "gone.png: no such file"),
        ("{oops\n", "x.jsonl:1: not a JSON object"),
        ('{"text": "猫"}\n', 'x.jsonl:1: no "image" in it, but text'),
        (b"\xff\n", "x.jsonl:1: not UTF-8"),
    ],
)
def test_on_error_raise(content: str | bytes, says: str, encode: Run, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = encode(tmp_path / "x.jsonl", "--on-error", "raise", "--kind", "images")
    assert (code, out) == (2, "")
    assert says in one_line(err)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_when_nothing_could_be_embedded(encode: Run, tmp_path: Path) -> None:
    code, _, err = encode("gone.png", "lost.jpg")
    assert code == 1
    assert one_line(err) == "cnclip: nothing was embedded: 2 of 2 items failed"


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["encode", "{tmp}/gone.txt", "--to", "{tmp}/o.npy", "--model", "{model}"], 2, "gone.txt: No such file"),
        (["encode", "{tmp}/*.png", "--on-error=raise", "--to={tmp}/o.npy", "--model", "{model}"], 2, "matches no file"),
        (["encode", "a.png", "--to", "{tmp}/o.npz", "--model", "{model}"], 2, "o.npz: the vectors go into a .npy file"),
        (["encode", "a.png", "--to", "{tmp}/o.npy", "--model", "{tmp}/nowhere"], 2, "nowhere: no such file or folder"),
        (["encode", "a.png", "--to", "{tmp}/o.npy", "--model", "{tmp}"], 2, "no Chinese CLIP in this folder"),
        (["encode", "a.png", "--to", "{tmp}/o.npy", "--model", "{model}", "--precision", "fp8"], 2, "fp8"),
        (["encode", "a.png", "--to", "{tmp}/o.npy", "--model", "{model}", "--device", "abacus"], 2, "abacus"),
        (["encode", "a.png", "--to", "{tmp}/file/o.npy", "--model", "{model}"], 1, "file"),
        (["convert", "{tmp}/nowhere", "{tmp}/out", "--to", "cn_clip"], 2, "nowhere: no such file or folder"),
        (["convert", "{tmp}/file", "{tmp}/out", "--to", "cn_clip"], 2, "file: "),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    argv: list[str], code: int, says: str, run: Run, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("words")
    got, out, err = run(*(arg.format(tmp=tmp_path, model=model_folder) for arg in argv))
    assert (got, out) == (code, "")
    assert says in one_line(err)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_the_hub_has_not(run: Run, tmp_path: Path, hub: Any) -> None:
    code, out, err = run("encode", "a.png", "--to", tmp_path / "o.npy", "--model", "nobody/nothing")
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if "nobody/nothing: no such model" in line)
    assert line == err.splitlines()[-1]  # before it the Hub client may log what it tried


def test_an_interrupt_ends_it_quietly(encode: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "iter_image", interrupted)
    code, out, err = encode("a.png")
    assert (code, out, err) == (130, "", "cnclip: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_it_is_tiny_and_says_so(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    code, out, err = run("encode", pictures[0], "--to", tmp_path / "out.npy", "--json", *CPU)
    assert code == 0
    assert json.loads(out)["model"] == "tiny"
    assert "cnclip: no --model given, using 'tiny'\n" in err
    expected = Encoder.from_pretrained("tiny", precision="fp32", device="cpu").encode_image(pictures[0])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = checkpoint.read(a), checkpoint.read(b)
    assert first.config == second.config
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(first.state[key], second.state[key]) for key in first.state)


@pytest.mark.parametrize("target", checkpoint.LAYOUTS)
@pytest.mark.parametrize("source", checkpoint.LAYOUTS)
def test_convert(source: str, target: str, run: Run, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    given = make_folder("vit", source)
    made = tmp_path / ("model.pt" if target == "cn_clip" else "model")
    code, out, err = run("convert", given, made, "--to", target, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"source": str(given), "written": str(made), "layout": target}
    assert checkpoint.read(made).layout == target
    assert_same_weights(given, made)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run("convert", given, made, "--to", target)
    assert (code, out) == (2, "")
    assert one_line(err) == f"cnclip: {made}: exists already; name a new file or an empty folder"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("weights", "files"),
    [
        ("bin", {"pytorch_model.bin"}),
        ("safetensors", {"model.safetensors"}),
        ("both", {"pytorch_model.bin", "model.safetensors"}),
    ],
)
def test_convert_weights(weights: str, files: set[str], run: Run, make_folder: Callable, tmp_path: Path) -> None:
    given = make_folder("vit", "cn_clip")
    code, out, _ = run("convert", given, tmp_path / "m", "--to", "modelscope", "--weights", weights)
    assert (code, out) == (0, f"{given} -> {tmp_path / 'm'} (modelscope)\n")
    assert {path.name for path in (tmp_path / "m").glob("*model.*")} == files
    assert_same_weights(given, tmp_path / "m")


def test_modelscopes_own_command_line(
    model_folder: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelscope_hub.cli.main import run_cmd

    argv = ["cnclip", "encode", *TEXTS, "--kind", "texts", "--model", str(model_folder), *CPU, "--json"]
    assert run_cmd([*argv, "--to", str(tmp_path / "out.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode_text(TEXTS), atol=1e-6)
    assert run_cmd([*argv, "--to", str(tmp_path / "out.txt")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.rstrip("\n").endswith("out.txt: the vectors go into a .npy file")


def test_as_a_program(model_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    """In a process of its own: warnings go to stderr, stdout has the document alone, texts come through a pipe."""
    program = [sys.executable, "-c", "import sys; from modelscope_cnclip.cli import main; sys.exit(main())"]
    out = ["--to", str(tmp_path / "out.npy"), "--model", str(model_folder), *CPU, "--json"]
    lines = "\ufeff一只猫\r\n".encode() + b"\xff\n" + ("猫" * 99).encode()
    done = subprocess.run([*program, "encode", "-", "--kind", "texts", *out], input=lines, capture_output=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 2
    assert done.stderr.decode().splitlines() == [
        "cnclip: skipped <stdin>:2: not UTF-8 (invalid start byte)",
        "cnclip: 1 of 2 texts were cut to 52 tokens (the longest has 101)",
    ]
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["一只猫", "猫" * 99]


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path, pictures: list[Path]) -> Path:
    """One step over twelve pairs, and the words that it is run with come last."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"image": str(path), "text": path.stem}) + "\n" for path in pictures))
    values = {
        "pretrained_model": {"model_name": str(model_folder)},
        "dataset": {"train": str(pairs), "val": str(pairs)},
        "train": {"max_steps": 1, "dataloader": {"batch_size_per_gpu": 4}},
    }
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values))
    return file


def test_train(recipe: Path, run: Run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    code, out, _ = run("train", recipe, "--work-dir", work, "--set", "train.max_steps=2", "--device", "cpu", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["work_dir"], told["steps"]) == (str(work), 2)
    assert 0 <= told["metrics"]["mean_recall"] <= 1
    assert json.loads((work / "recipe.json").read_text())["train"]["max_steps"] == 2
    assert Encoder.from_pretrained(work / "output", device="cpu").encode_text("猫").shape == (1, 32)

    code, out, err = run("train", recipe, "--work-dir", work, "--set", "train.max_steps=3", "--device", "cpu")
    assert (code, out) == (2, "")
    assert one_line(err).startswith(f"cnclip: {work}")
    assert "train.max_steps: 2 then, 3 now" in err
    assert "--allow-changed-recipe" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "train.stages[0].lr=1"], "train.stages"),
        (["--set", "train.learnrate=1"], "train.learnrate: there is no such key; the nearest is"),
        (["--set", 'train.stages=[{"freeze": ["visuall"], "max_steps": 1}]'], "'visuall' matches nothing"),
        (["--set", "dataset.train=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_train_with_bad_input(words: list[str], says: str, recipe: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run("train", recipe, "--work-dir", tmp_path / "work", "--device", "cpu", *words)
    assert (code, out) == (2, "")
    assert says in one_line(err)


def test_train_without_a_recipe(run: Run) -> None:
    code, out, err = run("train", "nowhere")
    assert (code, out) == (2, "")
    assert one_line(err) == "cnclip: nowhere: no such file; shipped recipes are finetune, tiny, two_stage"
    code, _, err = run("train", "tiny", "--set", "train.max_steps")
    assert code == 2
    assert "expected KEY=VALUE" in err
