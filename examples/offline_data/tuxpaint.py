"""Tux Paint's stamps as pictures with Chinese captions: which to use, what they are called, where they go.

No command of its own: ``build.py`` calls :func:`stamps` and :func:`split`. A stamp is a picture (``X.png``, or
``X.svg`` alone) and a text file ``X.txt`` with its name in some 100 languages. ``tuxpaint_zh.tsv`` beside this file has
our own caption wherever the Chinese line is missing, wrong (a bear called 梨) or odd; the other lines are read from the
package and only cleaned.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CORRECTIONS = Path(__file__).with_name("tuxpaint_zh.tsv")

# Letters, digits, notes and coins. `_mirror` and `_flip` are the same stamp, turned for the program's buttons.
SYMBOLS = re.compile(r"^symbols/|_(mirror|flip)$")
# Nothing to see on white, one file under two names, emblems to paste on another stamp, letters on a top.
UNUSABLE = frozenset(
    [
        "military/fireman240a",
        "naturalforces/lightningbolt",
        "seasonal/christmas/lamp",
        "seasonal/halloween/ghost",
        "seasonal/hanukkah/dreydl-gimmel",
        "seasonal/hanukkah/dreydl-hay",
        "seasonal/hanukkah/dreydl-nun",
        "seasonal/hanukkah/dreydl-shin",
        "seasonal/newyears/confetti",
        "town/flags/whiteflag",
        "vehicles/emergency/sedan_police",
    ]
)
SMALLEST = 32  # px, the longer side
MOST_OF_A_NOUN = 4  # pictures with one name, to be held out

# A photograph has a PNG and no SVG, lies in no folder of drawings, and has at least 140 colours at 5 bits a channel.
# Both lists of exceptions are from looking at all of them.
DRAWN_FOLDERS = re.compile(r"/(cartoon|hats|flags|easter|hanukkah|newyears)/")
PHOTO_COLOURS = 140
DRAWN = frozenset(
    [
        "clothes/button",
        "food/pizza",
        "naturalforces/explosion",
        "naturalforces/fire",
        "people/body_parts/eye",
        "seasonal/christmas/Santa",
        "seasonal/christmas/xmas_tp_bulb",
        "town/roadsigns/roundabout",
    ]
)
PHOTOGRAPHS = frozenset(
    [
        "animals/fish/shrimp",
        "animals/insects/fly",
        "animals/lizards/iguana",
        "household/dishes/glass",
        "household/tools/mallet_metal",
        "plants/trees/birch",
        "space/moon/moon_full",
        "space/planets/1_mercury",
        "town/roadsigns/no_entry_sign",
    ]
)

# Looked at: everything that matches is a clear example of its class and of no other.
CLASSES = {
    "鸟": "animals/birds/",
    "鱼": "animals/fish/(?!lobster|seahorse|shrimp)",
    "昆虫": "animals/insects/(?!Brown_slug|Woodlouse)",
    "牛": "animals/mammals/bovines/(bison|bull|cow|gnu|yak|zebu)",
    "羊": "animals/mammals/bovines/",
    "水果": "food/fruit/",
    "蔬菜": "food/vegetables/",
    "乐器": "hobbies/music/",
    "工具": "household/tools/(?!cementmixer)",
    "花": "plants/flowers/(?!appooppanthady)",
    "树": "plants/trees/(birch|holm_oak|liberia-palm|tree336)|seasonal/christmas/Christmas_Tree",
    "星球": "space/(moon|planets)/",
    "球": "sports/.*(ball|soccer)$",
    "交通标志": "town/roadsigns/(?!traffic_cone|toilets|railroad)",
    "汽车": "vehicles/(auto|emergency|garbagetruck|masstransit|race)",
}

MEASURE = re.compile(
    "^[一二两几](只|条|头|个|颗|朵|棵|株|块|片|把|副|支|枚|辆|架|艘|座|顶|件|套|串|根|台|张|杯|瓶|管|对|栋|间|口|盏|份"
    "|位|名|节|列|枝|团|撮|匹|粒|幢|面|道|滴|堆|束)(?=.)"
)


@dataclass(frozen=True)
class Stamp:
    """``name`` is the path below ``stamps/`` without its ending, ``texts`` the caption and the bare noun."""

    name: str
    file: Path
    texts: tuple[str, ...]
    photo: bool


def corrections(path: Path = CORRECTIONS) -> dict[str, str]:
    """Stamp name -> our caption.

    Raises:
        ValueError: a line is not a name, a tab and a caption, or a name comes twice; the line is named.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if not (tab and name and caption) or "\t" in caption or name in found:
            raise ValueError(f"{path}:{number}: expected 'name<TAB>caption', each name once, got {line!r}")
        found[name] = caption
    return found


def clean_caption(line: str) -> str:
    """The name in a line such as ``孔雀（一只雄性孔雀）。`` or ``火星—红色行星。在地球旁边。``: ``孔雀``, ``火星``.

    Quotation marks go, and everything from the first bracket, dash or end of sentence on.
    """
    return re.split("[。！!？?，,；;：（(—－]", re.sub("[“”\"'‘’]", "", line).strip(), maxsplit=1)[0].strip()


def texts_of(caption: str) -> tuple[str, ...]:
    """The caption, and without its measure word (``一只猫头鹰`` -> also ``猫头鹰``)."""
    return tuple(dict.fromkeys((caption, MEASURE.sub("", caption))))


def chinese_line(text_file: Path) -> str:
    """The ``zh_CN`` line of a stamp's text file, or an empty string."""
    found = re.search(r"^zh_CN\.utf8=(.*)$", text_file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1].strip() if found else ""


def is_photo(name: str, file: Path) -> bool:
    if name in PHOTOGRAPHS:
        return True
    if name in DRAWN or DRAWN_FOLDERS.search(name) or file.suffix == ".svg" or file.with_suffix(".svg").exists():
        return False
    pixels = np.asarray(Image.open(file).convert("RGBA"))
    return len(np.unique(pixels[pixels[..., 3] > 200][:, :3] // 8, axis=0)) >= PHOTO_COLOURS


def split(photos: list[Stamp]) -> dict[str, str]:
    """Stamp name -> ``train``, ``val`` or ``test``: 38 % of each class to test, 22 % of what has no class; 13 % to val.

    Whole nouns go one way, in the order of their md5, so that two photographs of a donkey are never on both sides; one
    with more than ``MOST_OF_A_NOUN`` pictures (gravestones) is trained on. Every class gets at least three test
    pictures and one for val.
    """
    where: dict[str, str] = {}
    for label in (*CLASSES, None):
        members: dict[str, list[str]] = {}
        for stamp in photos:
            if class_of(stamp.name) == label:
                members.setdefault(stamp.texts[-1], []).append(stamp.name)
        count = sum(map(len, members.values()))
        share = 0.38 if label else 0.22
        room = {"test": max(3, round(share * count)), "val": max(1, round(0.13 * count))}
        for noun in sorted(members, key=lambda noun: hashlib.md5(noun.encode()).hexdigest()):
            rare = len(members[noun]) <= MOST_OF_A_NOUN
            side = next((side for side, left in room.items() if left > 0 and rare), "train")
            if side != "train":
                room[side] -= len(members[noun])
            where.update(dict.fromkeys(members[noun], side))
    return where


def class_of(name: str) -> str | None:
    """The coarse Chinese class of a photograph, for zero-shot classification; None if it is in none of them."""
    return next((label for label, pattern in CLASSES.items() if re.match(pattern, name)), None)


def stamps(folder: Path) -> list[Stamp]:
    """Every usable stamp below ``folder`` (``…/share/tuxpaint/stamps``) that has a Chinese caption, sorted by name."""
    ours, found = corrections(), []
    for file in sorted([*folder.rglob("*.png"), *folder.rglob("*.svg")]):
        name = file.relative_to(folder).with_suffix("").as_posix()
        text_file = file.with_suffix(".txt")
        if file.suffix == ".svg" and file.with_suffix(".png").exists():
            continue
        if SYMBOLS.search(name) or name in UNUSABLE or not text_file.exists():
            continue
        if file.suffix == ".png" and max(Image.open(file).size) < SMALLEST:
            continue
        if caption := ours.get(name) or clean_caption(chinese_line(text_file)):
            found.append(Stamp(name, file, texts_of(caption), is_photo(name, file)))
    return sorted(found, key=lambda stamp: stamp.name)
