"""Chinese queries find pictures, and photographs get Chinese labels: a minute with a model that ships.

python examples/quickstart.py                # 'tiny', which is in the package
python examples/quickstart.py MODEL          # a Hub id or a folder, for example
                                             # damo/multi-modal_clip-vit-base-patch16_zh
"""

import sys
from pathlib import Path

from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

import modelscope_cnclip  # noqa: F401 - registers the models and pipelines
from modelscope_cnclip.checkpoint import locate

HERE = Path(__file__).parent
QUERIES = ("一只可爱的小狗", "水果", "下雪的冬天", "去旅行的交通工具", "音乐")
LABELS = ("猫", "狗", "一杯咖啡", "火箭", "汽车", "花", "山", "书")


def main(model: str = "tiny") -> None:
    pictures = sorted([*(HERE / "pictures").glob("*.png"), *(HERE / "gallery").glob("*.png")])
    photographs = sorted((HERE / "gallery").glob("photo-*.jpg"))

    pipe = pipeline(Tasks.multi_modal_embedding, model=str(locate(model)))
    found = pipe({"img": [str(path) for path in pictures], "text": list(QUERIES)})
    scores = found["text_embedding"] @ found["img_embedding"].T

    print(f"\n{len(QUERIES)} queries, the best three of {len(pictures)} pictures:\n")
    for query, row in zip(QUERIES, scores):
        best = ", ".join(f"{pictures[i].stem} {row[i]:.2f}" for i in row.argsort()[:-4:-1])
        print(f"  {query}{'　' * (10 - len(query))}{best}")

    found = pipe({"img": [str(path) for path in photographs], "text": list(LABELS)})
    scale = 1 / pipe.model.temperature.item()
    logits = scale * found["img_embedding"] @ found["text_embedding"].T
    print(f"\n{len(photographs)} photographs, zero-shot among {', '.join(LABELS)}:\n")
    for path, row in zip(photographs, logits):
        shares = sorted(zip(softmax(row), LABELS), reverse=True)[:3]
        print(f"  {path.name:<18}" + ", ".join(f"{label} {share:.0%}" for share, label in shares))


def softmax(row):
    powers = [2.718281828 ** (value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


if __name__ == "__main__":
    main(*sys.argv[1:2])
