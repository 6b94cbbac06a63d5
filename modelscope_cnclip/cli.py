"""``cnclip VERB …``, and the same as ``modelscope cnclip VERB …``.

    cnclip encode PICTURES… --to out.npy          # vectors and a manifest
    cnclip convert IN OUT --to transformers       # one checkpoint layout into another
    cnclip train RECIPE.json                      # what a recipe says; again after an interruption, it goes on

Long work shows a bar. ``--json`` prints one JSON document on stdout and nothing else there. Errors are one line on
stderr; exit code 2 for bad input, 1 for a failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cnclip", description="Chinese CLIP: image and text embeddings on ModelScope."
    )
    parser.add_argument("--version", action="version", version=f"cnclip {__version__}")
    _add_verbs(parser)
    return _run(parser.parse_args(argv))


class ModelScopeCommand:
    """``modelscope cnclip …``: the entry point that ModelScope's own command line looks for."""

    name = "cnclip"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @staticmethod
    def register(subparsers: Any) -> None:
        parser = subparsers.add_parser("cnclip", help="Chinese CLIP: image and text embeddings (modelscope-cnclip).")
        _add_verbs(parser)
        parser.set_defaults(_command=ModelScopeCommand)

    def execute(self) -> None:
        code = _run(self.args)
        if code:
            raise SystemExit(code)


def _add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="cnclip_verb", metavar="VERB", required=True)

    encode = verbs.add_parser("encode", help="pictures or texts to vectors", description=ENCODE)
    encode.add_argument("inputs", nargs="+", metavar="INPUT", help="what to embed, see above; - is standard input")
    encode.add_argument("--to", required=True, metavar="OUT.npy", help="vectors; the manifest goes beside it")
    encode.add_argument(
        "--kind", choices=("images", "texts"), help="what the inputs hold, where their names don't tell"
    )
    encode.add_argument("--manifest", choices=("parquet", "jsonl"), default="parquet")
    encode.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="what a bad item does")
    encode.add_argument("--batch-size", type=_positive, metavar="N")
    _add_model(encode)
    encode.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    encode.set_defaults(verb=_encode)

    convert = verbs.add_parser("convert", help="one checkpoint layout into another", description=CONVERT)
    convert.add_argument("source", metavar="IN", help="a folder, a .pt file or a Hub id")
    convert.add_argument("target", metavar="OUT", help="a new folder; a new .pt file for cn_clip")
    convert.add_argument("--to", required=True, choices=("modelscope", "cn_clip", "transformers"))
    convert.add_argument(
        "--weights",
        choices=("bin", "safetensors", "both"),
        default="bin",
        help="file format in a ModelScope folder; the built-in reads only bin",
    )
    convert.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    convert.set_defaults(verb=_convert)

    train = verbs.add_parser("train", help="train what a recipe says", description=TRAIN)
    train.add_argument("recipe", metavar="RECIPE", help="a JSON file, or the name of a shipped one: two_stage, …")
    train.add_argument("--work-dir", metavar="DIR", help="instead of the recipe's train.work_dir")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", type=_assignment,
        help="put a value over the recipe's; VALUE is JSON, or else a text. May be repeated",
    )  # fmt: skip
    train.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    train.add_argument(
        "--allow-changed-recipe", action="store_true", help="go on although the recipe isn't what the run began with"
    )
    train.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    train.set_defaults(verb=_train)


ENCODE = """Embed pictures (files, folders, globs, addresses, .txt lists of paths, cn_clip's *_imgs.tsv, .jsonl with
"image") or texts (.txt with one a line, .jsonl with "text", .tsv with ID and text, or the texts themselves with
--kind texts)."""
CONVERT = """Write a checkpoint in the layout of ModelScope (a folder that its built-in loads too), cn_clip (a .pt
file) or transformers (ChineseCLIPModel). The layout of IN is recognised. Weights keep their dtype, bit for bit."""

TRAIN = """Train a Chinese CLIP as a recipe says: from an image tower and a BERT, or from a checkpoint, in any number of
stages. configuration/README.md explains every key. Paths in a recipe are relative to where the command is run. Several
processes: torchrun --nproc_per_node N -m modelscope_cnclip.trainers RECIPE, with the same options."""


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id, folder, .pt file or 'tiny' (the default)")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")


def _run(args: argparse.Namespace) -> int:
    from .checkpoint import CheckpointError
    from .data import DataError
    from .hub import HubError
    from .images import ImageError
    from .preprocessor import VocabularyError
    from .trainers.recipe import RecipeError

    logging.basicConfig(level=logging.WARNING, format="cnclip: %(message)s", stream=sys.stderr)
    try:
        return args.verb(args)
    except (CheckpointError, DataError, HubError, ImageError, RecipeError, VocabularyError, ValueError) as error:
        print(f"cnclip: {_one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:
        print(f"cnclip: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cnclip: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    """The Hub client's errors have several."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def _encode(args: argparse.Namespace) -> int:
    from . import bulk, data
    from .encoder import Encoder

    kind = args.kind or data.guess_kind(args.inputs)
    bad: list[data.DataError] = []

    def on_bad(error: data.DataError) -> None:
        if args.on_error == "raise":
            raise error
        bad.append(error)
        print(f"cnclip: skipped {error}", file=sys.stderr)

    read = data.image_records if kind == "images" else data.text_records
    encoder = Encoder.from_pretrained(
        _model(args), precision=args.precision, device=args.device, revision=args.revision
    )
    start = time.perf_counter()
    summary = bulk.encode_to(
        encoder,
        read(args.inputs, on_bad),
        kind,
        args.to,
        manifest=args.manifest,
        batch_size=args.batch_size,
        on_error=args.on_error,
    )
    skipped = summary.skipped + len(bad)
    result = asdict(summary) | {"skipped": skipped, "seconds": round(time.perf_counter() - start, 3)}
    rows = f"{summary.rows} {kind if summary.rows != 1 else kind[:-1]}"
    told = f"{rows} -> {summary.vectors} ({summary.rows} × {summary.dim}) and {summary.manifest}"
    _tell(args, result, f"{told}; {skipped} skipped" if skipped else told)
    if not summary.rows:
        print(f"cnclip: nothing was embedded: {skipped} of {skipped} items failed", file=sys.stderr)
        return 1
    return 0


def _convert(args: argparse.Namespace) -> int:
    from . import checkpoint

    source = checkpoint.locate(args.source)
    written = checkpoint.convert(source, args.target, args.to, weights=args.weights)
    _tell(
        args, {"source": str(source), "written": str(written), "layout": args.to}, f"{source} -> {written} ({args.to})"
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from .trainers.recipe import locate_recipe, read_recipe
    from .trainers.trainer import CnclipTrainer

    file = locate_recipe(args.recipe)
    values = read_recipe(file, dict(args.set))
    with tempfile.TemporaryDirectory() as folder:
        complete = Path(folder) / file.name  # the host reads its configuration from a file
        complete.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        trainer = CnclipTrainer(cfg_file=str(complete), where=str(file), work_dir=args.work_dir, device=args.device)
        trainer.train(allow_changed_recipe=args.allow_changed_recipe)
    work_dir, metrics = str(trainer.work_dir), trainer.metric_values or {}
    if trainer.ranks.first:
        result = {"work_dir": work_dir, "steps": trainer.progress.step, "metrics": metrics}
        scores = ", ".join(f"{name} {metrics[name]:.4f}" for name in metrics if name.endswith("mean_recall"))
        _tell(args, result, f"{trainer.progress.step} steps -> {work_dir}" + (f"; {scores}" if scores else ""))
    return 0


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _model(args: argparse.Namespace) -> str:
    if args.model is None:
        print("cnclip: no --model given, using 'tiny'", file=sys.stderr)
    return args.model or "tiny"


def _tell(args: argparse.Namespace, result: dict[str, Any], line: str) -> None:
    print(json.dumps(result, ensure_ascii=False) if args.json else line)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number
