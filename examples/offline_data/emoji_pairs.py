"""Emoji as pictures with Chinese texts: one concept, drawn by several vendors, named by Unicode's CLDR.

No command of its own: ``build.py`` calls :func:`concepts` and :func:`pictures`. A concept's id is its code points in
hexadecimal, joined by ``-``, without the variation selector FE0F, in capitals; every package is joined on that.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

VENDORS = ("google", "twitter", "fluent")  # trained on
TEST_VENDOR = "openmoji"


@dataclass(frozen=True)
class Concept:
    """``texts``: the CLDR name, then its keywords. ``split``: train, val or test."""

    id: str
    texts: tuple[str, ...]
    split: str
    flag: bool


def join_code(code: str) -> str:
    """``2764-fe0f`` -> ``2764``; what all packages agree on."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def code_of(emoji: str) -> str:
    return join_code("-".join(f"{ord(char):04X}" for char in emoji))


def split_of(code: str) -> str:
    """About 77 / 7 / 16 %, by the first code point, which keeps gendered and joined variants of a concept together."""
    bucket = int(hashlib.md5(code.split("-")[0].encode()).hexdigest(), 16) % 100
    return "val" if bucket < 7 else "train" if bucket < 82 else "test"


def natural_name(name: str) -> str:
    """CLDR's ``旗: 中国`` as one says it, ``中国旗``; ``女人: 红发`` -> ``红发女人``; ``按键: 1`` -> ``按键1``."""
    head, colon, tail = re.sub("[：:] *", ":", name).partition(":")
    if not colon:
        return name
    if head == "按键":
        return head + tail
    return f"{tail}的{head}" if head == "家庭" or tail.startswith("面向") else tail + head


def annotations(modules: Path) -> dict[str, tuple[str, ...]]:
    """Concept id -> Chinese name and keywords, from CLDR's plain and derived annotations."""
    found = {}
    for file, key in (
        ("cldr-annotations-derived-full/annotationsDerived/zh/annotations.json", "annotationsDerived"),
        ("cldr-annotations-full/annotations/zh/annotations.json", "annotations"),
    ):
        for emoji, entry in json.loads((modules / file).read_text(encoding="utf-8"))[key]["annotations"].items():
            if entry.get("tts"):
                names = (natural_name(entry["tts"][0]), *entry.get("default", ()))
                found[code_of(emoji)] = tuple(dict.fromkeys(names))
    return found


def concepts(modules: Path) -> list[Concept]:
    """Every emoji with a Chinese name, sorted by id; no components (skin tones, hair), no skin-tone variants."""
    texts = annotations(modules)
    listed = json.loads((modules / "emoji-datasource-google/emoji.json").read_text(encoding="utf-8"))
    codes = {join_code(entry["unified"]): entry["category"] for entry in listed if entry["category"] != "Component"}
    return [
        Concept(code, texts[code], split_of(code), category == "Flags")
        for code, category in sorted(codes.items())
        if code in texts
    ]


def pictures(modules: Path) -> dict[str, dict[str, Path]]:
    """Vendor -> concept id -> picture file."""
    folders = {
        "google": ("emoji-datasource-google/img/google/64", "*.png"),
        "twitter": ("emoji-datasource-twitter/img/twitter/64", "*.png"),
        "fluent": ("@lobehub/fluent-emoji-3d/assets", "*.webp"),
        "openmoji": ("openmoji/color/svg", "*.svg"),
    }
    return {
        vendor: {join_code(file.stem): file for file in sorted((modules / folder).glob(pattern))}
        for vendor, (folder, pattern) in folders.items()
    }
