"""Image and text embedding beside cn_clip and transformers, loading time and memory: one run, one table.

    pip install -e '.[test]' && pip install --no-deps cn_clip==1.6.0
    python -m benchmarks.encode                       # ViT-B/16; about 5 minutes on 2 cores
    python -m benchmarks.encode --load vit-h-14       # only loading: time and peak memory against the file's size

All sides have the same random weights and inputs, take turns in one process, and are timed from PIL pictures or
strings to vectors, preprocessing included. cn_clip and transformers run as their documentation has it: cn_clip in
fp32 with texts padded to 52, transformers in fp32 with texts padded to the longest. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modelscope_cnclip import checkpoint, layouts
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.towers import ChineseCLIP, TowerConfig

HERE = Path(__file__).parent
UPSTREAM = {
    "rn50": ("RN50", "RBT3-chinese"),
    "vit-b-16": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"),
    "vit-l-14": ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese"),
    "vit-h-14": ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese"),
}
# One process per row: what a program needs from its start to the model in memory.
LOADERS = {
    "cn_clip": "from cn_clip.clip import load_from_name as f; f({pt!r}, 'cpu', None, {vision!r}, {text!r}, {r})",
    "modelscope_cnclip": "from modelscope_cnclip import Encoder; Encoder.from_pretrained({pt!r}, precision='fp32')",
    "transformers": "from transformers import ChineseCLIPModel; ChineseCLIPModel.from_pretrained({hf!r})",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit-b-16", choices=UPSTREAM)
    parser.add_argument("--load", choices=UPSTREAM, help="measure only the loading of this size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()

    size = args.load or args.size
    figures = {"size": size, "machine": machine()}
    print(figures["machine"] + "\n")
    with tempfile.TemporaryDirectory() as folder:
        files = write_checkpoints(TowerConfig.named(size), Path(folder))
        figures["loading"] = loading(files, size)
        if not args.load:
            figures["speed"] = speed(files, size, args.rounds, args.images, args.texts)
            figures["import"] = import_time(args.rounds)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> str:
    import cn_clip  # noqa: F401 - fails early, with the name of what is missing
    import transformers

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next(
            line.split(": ")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    return (
        f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"transformers {transformers.__version__}, cn_clip 1.6.0, Python {platform.python_version()}"
    )


def write_checkpoints(config: TowerConfig, folder: Path) -> dict[str, Path]:
    """Random weights in cn_clip's and, for a ViT, transformers' layout."""
    torch.manual_seed(0)
    model = checkpoint.Checkpoint.of(ChineseCLIP(config), layouts.default_vocab())
    files = {"pt": checkpoint.write(model, folder / "model.pt", "cn_clip")}
    if config.is_vit:
        files["hf"] = checkpoint.write(model, folder / "hf", "transformers")
    return files


def speed(files: dict[str, Path], size: str, rounds: int, n_images: int, n_texts: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(n_images)]
    captions = (HERE / "captions.txt").read_text(encoding="utf-8").splitlines()
    texts = [captions[i % len(captions)] for i in range(n_texts)]

    sides = contestants(files, size)
    lengths = [len(ids) for ids in sides["ours fp32"][2].tokenizer(captions)]
    print(
        f"{n_images} pictures of 640×480; {n_texts} captions, "
        f"{min(lengths)}–{max(lengths)} tokens, median {statistics.median(lengths):g}; median of {rounds} rounds\n"
    )
    seconds: dict[str, dict[str, list[float]]] = {name: {"images": [], "texts": []} for name in sides}
    for image, text, _ in sides.values():  # warm-up
        image(images[:32]), text(texts[:256])
    for _ in range(rounds):
        for name, (image, text, _) in sides.items():
            seconds[name]["images"].append(timed(image, images))
            seconds[name]["texts"].append(timed(text, texts))

    base = {kind: statistics.median(seconds["cn_clip fp32"][kind]) for kind in ("images", "texts")}
    reference = {"images": sides["cn_clip fp32"][0](images), "texts": sides["cn_clip fp32"][1](texts)}
    print("| | images/s | × cn_clip | captions/s | × cn_clip | lowest cosine to cn_clip, images / captions |")
    print("|---|---|---|---|---|---|")
    out = {}
    for name, (image, text, _) in sides.items():
        medians = {kind: statistics.median(values) for kind, values in seconds[name].items()}
        cosines = {
            "images": lowest(image(images), reference["images"]),
            "texts": lowest(text(texts), reference["texts"]),
        }
        rates = n_images / medians["images"], n_texts / medians["texts"]
        ratios = base["images"] / medians["images"], base["texts"] / medians["texts"]
        print(
            f"| {name} | {rates[0]:.1f} | {ratios[0]:.2f} | {rates[1]:.0f} | {ratios[1]:.2f} "
            f"| {cosines['images']:.5f} / {cosines['texts']:.5f} |",
            flush=True,
        )
        out[name] = {"images/s": rates[0], "captions/s": rates[1], "image ratio": ratios[0], "caption ratio": ratios[1]}
        out[name] |= {f"cosine {kind}": value for kind, value in cosines.items()}
    print()
    return out


Side = tuple[Callable[[list], np.ndarray], Callable[[list], np.ndarray], object]


def contestants(files: dict[str, Path], size: str) -> dict[str, Side]:
    """name -> (pictures to vectors, texts to vectors, the model)."""
    import cn_clip.clip as upstream

    with contextlib.redirect_stdout(io.StringIO()):
        resolution = TowerConfig.named(size).image_resolution
        model, transform = upstream.load_from_name(str(files["pt"]), "cpu", None, *UPSTREAM[size], resolution)
    model.eval()

    @torch.no_grad()
    def their_images(images: list) -> np.ndarray:
        parts = [model.encode_image(torch.stack([transform(i) for i in part])) for part in split(images, 32)]
        return unit(torch.cat(parts))

    @torch.no_grad()
    def their_texts(texts: list) -> np.ndarray:
        return unit(torch.cat([model.encode_text(upstream.tokenize(part)) for part in split(texts, 256)]))

    sides: dict[str, Side] = {"cn_clip fp32": (their_images, their_texts, model)}
    if "hf" in files:
        sides["transformers fp32"] = transformers_side(files["hf"])
    for precision in ("fp32", "bf16"):
        encoder = Encoder.from_pretrained(files["pt"], precision=precision, device="cpu")
        sides[f"ours {precision}"] = (encoder.encode_image, encoder.encode_text, encoder)
    return sides


def transformers_side(folder: Path) -> Side:
    from transformers import ChineseCLIPModel, ChineseCLIPProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, processor = ChineseCLIPModel.from_pretrained(folder).eval(), ChineseCLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def images_to_vectors(images: list) -> np.ndarray:
        parts = [
            model.get_image_features(**processor.image_processor(images=part, return_tensors="pt")).pooler_output
            for part in split(images, 32)
        ]
        return unit(torch.cat(parts))

    @torch.no_grad()
    def texts_to_vectors(texts: list) -> np.ndarray:
        parts = [
            model.get_text_features(**processor.tokenizer(part, padding=True, return_tensors="pt")).pooler_output
            for part in split(texts, 256)
        ]
        return unit(torch.cat(parts))

    return images_to_vectors, texts_to_vectors, model


def loading(files: dict[str, Path], size: str) -> dict[str, dict[str, float]]:
    """Seconds and peak resident memory of a fresh process that imports a library and loads the model."""
    weights = files["pt"].stat().st_size
    vision, text = UPSTREAM[size]
    resolution = TowerConfig.named(size).image_resolution
    print(f"{size}: a file of {weights / 2**20:.0f} MiB; fresh process, libraries and model loaded, nothing computed\n")
    print("| | seconds | peak memory, MiB | × the file |\n|---|---|---|---|")
    out = {}
    for name, code in LOADERS.items():
        if name == "transformers" and "hf" not in files:
            continue
        code = code.format(pt=str(files["pt"]), hf=str(files.get("hf")), vision=vision, text=text, r=resolution)
        runs = [alone(code) for _ in range(3)]
        seconds, peak = (statistics.median(values) for values in zip(*runs))
        out[name] = {"seconds": seconds, "peak MiB": peak / 2**20, "times file": peak / weights}
        print(f"| {name} | {seconds:.1f} | {peak / 2**20:.0f} | {peak / weights:.2f} |", flush=True)
    print()
    return out


def alone(code: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of ``python -c code``."""
    # Not getrusage: a child starts with its parent's peak. Linux only.
    code += "\nprint('peak', next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.rsplit("peak", 1)[1]) * 1024


def import_time(rounds: int) -> dict[str, float]:
    """Milliseconds that ``import modelscope_cnclip`` adds to ``import modelscope``."""
    code = "import time, modelscope; t = time.perf_counter(); import modelscope_cnclip; print(time.perf_counter() - t)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) * 1000 for _ in range(rounds)]
    print(
        f"import modelscope_cnclip, on top of import modelscope: {statistics.median(runs):.0f} ms (median of {rounds})"
    )
    return {"milliseconds": statistics.median(runs)}


def timed(work: Callable[[list], np.ndarray], items: list) -> float:
    start = time.perf_counter()
    work(items)
    return time.perf_counter() - start


def split(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.float(), dim=-1).numpy()


def lowest(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).min())


if __name__ == "__main__":
    main()
