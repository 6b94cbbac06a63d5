"""The rules that examples/offline_data builds its data by: joins, splits, captions, vocabulary. Nothing is fetched."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from modelscope_cnclip.preprocessor import Tokenizer

Load = Callable[[str], ModuleType]
FOLDER = Path(__file__).parent.parent / "examples" / "offline_data"


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """One of the folder's files as a module; they import each other as a script's neighbours do."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def emoji(load: Load) -> ModuleType:
    return load("emoji_pairs")


@pytest.fixture(scope="module")
def tuxpaint(load: Load) -> ModuleType:
    return load("tuxpaint")


@pytest.fixture(scope="module")
def towers(load: Load) -> ModuleType:
    return load("towers")


def test_every_package_s_spelling_of_a_code_joins(emoji: ModuleType) -> None:
    assert emoji.join_code("2764-fe0f-200d-1f525") == emoji.join_code("2764-200D-1F525") == "2764-200D-1F525"
    assert emoji.code_of("❤️\u200d🔥") == "2764-200D-1F525"
    assert emoji.code_of("#️⃣") == emoji.join_code("0023-fe0f-20e3") == "0023-20E3"


def test_variants_of_a_concept_share_its_split(emoji: ModuleType) -> None:
    codes = [f"{code:X}" for code in range(0x1F400, 0x1F800)]
    for code in codes:
        assert emoji.split_of(code) == emoji.split_of(f"{code}-200D-2640")
    shares = {
        side: sum(emoji.split_of(code) == side for code in codes) / len(codes) for side in ("train", "val", "test")
    }
    assert shares == pytest.approx({"train": 0.75, "val": 0.07, "test": 0.18}, abs=0.05)


@pytest.mark.parametrize(
    ("name", "natural"),
    [("旗: 中国", "中国旗"), ("女人: 红发", "红发女人"), ("按键: 1", "按键1"), ("狗脸", "狗脸"),
     ("男行人: 面向右边", "面向右边的男行人"), ("家庭: 男人女孩", "男人女孩的家庭")],
)  # fmt: skip
def test_cldr_names_read_as_one_says_them(emoji: ModuleType, name: str, natural: str) -> None:
    assert emoji.natural_name(name) == natural


def test_corrections_are_well_formed(tuxpaint: ModuleType) -> None:
    lines = tuxpaint.CORRECTIONS.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 300
    names = [line.split("\t")[0] for line in lines]
    assert names == sorted(set(names))
    for line in lines:
        name, caption = line.split("\t")
        assert re.fullmatch(r"[\w/-]+", name, re.ASCII)
        assert re.fullmatch("[\u4e00-\u9fffT、]{1,16}", caption), line
        assert not tuxpaint.SYMBOLS.search(name)
        assert name not in tuxpaint.UNUSABLE
    assert tuxpaint.corrections() == dict(line.split("\t") for line in lines)


@pytest.mark.parametrize("line", ["a/b", "a/b\t", "\t猫", "a/b\t猫\t狗"])
def test_a_malformed_correction_is_named(tuxpaint: ModuleType, tmp_path: Path, line: str) -> None:
    path = tmp_path / "zh.tsv"
    path.write_text(f"animals/cat\t一只猫\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"zh\.tsv:2"):
        tuxpaint.corrections(path)


@pytest.mark.parametrize(
    ("line", "caption"),
    [("青蛙。", "青蛙"), ("火星—红色行星。在地球旁边。", "火星"), ("一只孔雀（一只雄性孔雀）", "一只孔雀"),
     ("“富士”苹果。", "富士苹果"), ("停！现在停。", "停"), ("", "")],
)  # fmt: skip
def test_captions_are_cut_to_the_name(tuxpaint: ModuleType, line: str, caption: str) -> None:
    assert tuxpaint.clean_caption(line) == caption


def test_bare_nouns(tuxpaint: ModuleType) -> None:
    assert tuxpaint.texts_of("一只猫头鹰") == ("一只猫头鹰", "猫头鹰")
    assert tuxpaint.texts_of("猫头鹰") == ("猫头鹰",)
    assert tuxpaint.texts_of("一个") == ("一个",)


def test_photographs_are_split_by_noun_and_class(tuxpaint: ModuleType) -> None:
    nouns = [("animals/birds", 12), ("space/planets", 6), ("household/other", 40)]
    photos = [
        tuxpaint.Stamp(f"{folder}/{i}{copy}", Path("x.png"), (f"{folder}{i}",), True)
        for folder, count in nouns
        for i in range(count)
        for copy in "ab"
    ]
    graves = [tuxpaint.Stamp(f"graves/{i}", Path("x.png"), ("墓碑",), True) for i in range(6)]
    where = tuxpaint.split(photos + graves)
    assert set(where) == {stamp.name for stamp in photos + graves}
    for stamp in photos:
        assert where[stamp.name] == where[stamp.name[:-1] + "a"]
    for folder in ("animals/birds", "space/planets"):
        sides = [side for name, side in where.items() if name.startswith(folder)]
        assert sides.count("test") >= 3
        assert sides.count("val") >= 1
        assert sides.count("train") > 0
    assert {where[grave.name] for grave in graves} == {"train"}
    assert tuxpaint.split(photos[::-1] + graves) == where


def test_photo_or_drawing(tuxpaint: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo, drawing = tmp_path / "photo.png", tmp_path / "drawing.png"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(photo)
    Image.new("RGB", (40, 40), "red").save(drawing)
    assert tuxpaint.is_photo("animals/photo", photo)
    assert not tuxpaint.is_photo("animals/cartoon/photo", photo)
    assert not tuxpaint.is_photo("animals/drawing", drawing)
    photo.with_suffix(".svg").touch()
    assert not tuxpaint.is_photo("animals/photo", photo)


def test_transparent_pictures_come_on_white_and_small(load: Load, tmp_path: Path) -> None:
    build = load("build")
    image = Image.new("RGBA", (400, 100), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 200, 100))
    image.save(tmp_path / "x.png")
    drawn = build.draw(tmp_path / "x.png")
    assert (drawn.mode, drawn.size) == ("RGB", (160, 40))
    assert drawn.getpixel((150, 20)) == (255, 255, 255)
    assert drawn.getpixel((20, 20)) == (0, 0, 255)
    clear = build.draw(tmp_path / "x.png", alpha=True)
    assert (clear.mode, clear.size) == ("RGBA", (160, 40))
    assert clear.getpixel((150, 20)) == (255, 255, 255, 0)
    assert clear.getpixel((20, 20)) == (0, 0, 255, 255)


def test_pictures_that_are_there_stay(load: Load, tmp_path: Path) -> None:
    build = load("build")
    source, target = tmp_path / "x.png", tmp_path / "pictures" / "x.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(source)
    build.save(source, target, alpha=False)
    before = target.stat().st_mtime_ns
    build.save(source, target, alpha=False)
    assert target.stat().st_mtime_ns == before
    build.save(source, target, alpha=True)
    assert Image.open(target).mode == "RGBA"


def test_a_missing_tool_is_one_line(tmp_path: Path) -> None:
    program = (
        "import sys, types; sys.modules['resvg_py'] = types.ModuleType('resvg_py')\n"
        f"sys.path.insert(0, {str(FOLDER)!r}); sys.argv = ['build.py', {str(tmp_path)!r}]\n"
        "import build, shutil; shutil.which = lambda tool: None; build.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "build.py: npm is not installed: install Node.js, for example 'apt-get install npm'"


def test_vocabulary_splits_as_chinese_bert(towers: ModuleType, tmp_path: Path) -> None:
    captions = ["一只猫头鹰", "T恤衫", "ID按钮、OK", "“服务费”", "10:30"]
    pieces = towers.vocabulary(captions, 600, {"▁id": -5.0, "的": -1.0, "在": -2.0})
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(pieces) == len(set(pieces)) == 600
    assert "的" in pieces
    assert "ok" not in pieces
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(pieces), encoding="utf-8")
    ids = Tokenizer(vocab)(captions)
    assert 1 not in {i for one in ids for i in one}  # [UNK]
    assert [pieces[i] for i in ids[2]] == ["[CLS]", "id", "按", "钮", "、", "o", "##k", "[SEP]"]
    with pytest.raises(ValueError, match="the captions alone need"):
        towers.vocabulary(captions, 100, {})


def test_common_characters_are_gb2312_s_first_level(towers: ModuleType) -> None:
    found = towers.common_characters()
    assert (len(found), found[0], found[-1]) == (3755, "啊", "座")


def test_weights_that_do_not_fit_are_named(towers: ModuleType) -> None:
    names = {"conv_stem.weight": torch.zeros(2, 3), "bn1.bias": torch.zeros(2)}
    stored = {"_conv.weight": torch.ones(2, 3), "_bn0.bias": torch.ones(2)}
    assert list(towers.timm_state(stored, names)) == list(names)
    with pytest.raises(ValueError, match=r"_bn0\.bias \(3,\) does not fit timm's bn1\.bias \(2,\)"):
        towers.timm_state({**stored, "_bn0.bias": torch.ones(3)}, names)
