"""What a model finds in the pictures that it was never trained on: recall and zero-shot accuracy, with n and chance.

    python examples/offline_data/measure.py PAIRS                  # 'tiny', the checkpoint that ships
    python examples/offline_data/measure.py PAIRS --model work/tiny/output_best

PAIRS is what build.py wrote. Text to image is each name against all pictures of its file; chance is that of a random
order. Zero-shot puts the coarse classes' bare names against the labelled photographs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from modelscope_cnclip import Encoder
from modelscope_cnclip.pairs import read_pairs
from modelscope_cnclip.retrieval import KS, first_hit, recall

FILES = {
    "test_vendor": "openmoji, a vendor never trained on, concepts that were",
    "test_unseen": "openmoji, concepts never trained on",
    "test_photos": "held-out Tux Paint photographs",
}


def measure(encoder: Encoder, folder: Path) -> list[dict[str, Any]]:
    """A row per file, and one for zero-shot; scores in percent."""
    rows = []
    vectors: dict[str, np.ndarray] = {}
    for name, what in FILES.items():
        pairs = read_pairs(str(folder / f"{name}.jsonl"))
        images = encoder.encode_image([pairs[i].image for i in range(len(pairs))])
        texts = encoder.encode_text([pairs.texts(i)[0] for i in range(len(pairs))])
        ids = [pairs.image_id(i) for i in range(len(pairs))]
        vectors |= {Path(pairs[i].image).relative_to(folder).as_posix(): images[i] for i in range(len(pairs))}
        scores = {}
        for way, ranks in (
            ("t2i", first_hit(texts, images, [{one} for one in ids], ids)),
            ("i2t", first_hit(images, texts, [{one} for one in ids], ids)),
        ):
            scores |= {f"{way} R@{k}": 100 * recall(ranks, k) for k in KS}
            scores[f"{way} MR"] = float(np.mean([scores[f"{way} R@{k}"] for k in KS]))
        chance = 100 * float(np.mean([min(1.0, k / len(pairs)) for k in KS]))
        rows.append({"what": what, "n": len(pairs), "chance MR": chance, **scores})
    classes = json.loads((folder / "photo_classes.json").read_text(encoding="utf-8"))
    labels = encoder.encode_text(classes["classes"])
    pictures = np.stack([vectors[image] for image in classes["labels"]])
    found = (pictures @ labels.T).argmax(1)
    hits = [classes["classes"][i] == label for i, label in zip(found, classes["labels"].values())]
    count = len(classes["classes"])
    what = f"zero-shot, {count} classes of those photographs"
    rows.append({"what": what, "n": len(hits), "chance": 100 / count, "accuracy": 100 * np.mean(hits)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | n | text→image R@1 / 5 / 10 | MR | image→text MR | chance MR |", "|---|---|---|---|---|---|"]
    for row in rows[:-1]:
        at = " / ".join(f"{row[f't2i R@{k}']:.1f}" for k in KS)
        means = " | ".join(f"{row[key]:.1f}" for key in ("t2i MR", "i2t MR", "chance MR"))
        lines.append(f"| {row['what']} | {row['n']} | {at} | {means} |")
    last = rows[-1]
    lines += ["", f"{last['what']}: {last['accuracy']:.1f}% of {last['n']} right, chance {last['chance']:.1f}%"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="the folder that build.py wrote")
    parser.add_argument("--model", default="tiny", help="a Hub id, a folder or tiny (default: %(default)s)")
    args = parser.parse_args()
    print(table(measure(Encoder.from_pretrained(args.model, precision="fp32"), args.pairs)))


if __name__ == "__main__":
    main()
