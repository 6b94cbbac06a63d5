"""Twelve real pictures and their Chinese captions through ModelScope's pipeline: a table of cosines.

python examples/quickstart.py                # 'tiny': freshly initialised today, so the scores mean nothing yet
python examples/quickstart.py MODEL          # a Hub id or a folder, for example
                                             # damo/multi-modal_clip-vit-base-patch16_zh
"""

import sys
from pathlib import Path

from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

import modelscope_cnclip  # noqa: F401 - registers the models and pipelines
from modelscope_cnclip.checkpoint import locate

PICTURES = Path(__file__).parent / "pictures"


def main(model: str = "tiny") -> None:
    lines = (PICTURES / "captions.tsv").read_text(encoding="utf-8").splitlines()
    names, captions = zip(*(line.split("\t") for line in lines))

    pipe = pipeline(Tasks.multi_modal_embedding, model=str(locate(model)))
    found = pipe({"img": [str(PICTURES / name) for name in names], "text": list(captions)})
    scores = found["text_embedding"] @ found["img_embedding"].T

    print("\ncosine of each caption (row) and picture (column); * marks each row's best\n")
    print(" " * 8 + "".join(f"{name.removesuffix('.png')[:6]:>7}" for name in names) + "   caption")
    for caption, row in zip(captions, scores):
        cells = (f"{score:>6.2f}{'*' if i == row.argmax() else ' '}" for i, score in enumerate(row))
        print(" " * 8 + "".join(cells) + f"   {caption}")
    hits = sum(row.argmax() == i for i, row in enumerate(scores))
    print(f"\n{hits} of {len(captions)} captions find their picture first (chance: 1).")
    if model == "tiny":
        print("'tiny' is freshly initialised and was never trained: these scores mean nothing yet.")
        print("tiny 是随机初始化、未经训练的模型: 上面的分数目前没有任何意义。")


if __name__ == "__main__":
    main(*sys.argv[1:2])
