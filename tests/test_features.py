"""Kept image features: the plain path's numbers, computed once, and again only if something they depend on changed."""

from __future__ import annotations

import base64
import copy
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from modelscope_cnclip import layouts
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.pairs import PairDataset, read_pairs
from modelscope_cnclip.preprocessor import ImageTransform, Tokenizer
from modelscope_cnclip.towers import ChineseCLIP
from modelscope_cnclip.trainers.distributed import Ranks
from modelscope_cnclip.trainers.features import FeatureCache, why_not
from modelscope_cnclip.trainers.live import PairForward, evaluating, live_encoder
from modelscope_cnclip.trainers.recipe import Recipe, Stage
from modelscope_cnclip.trainers.two_stage import freeze, frozen_names, set_modes

from .conftest import CONFIGS, make_model
from .pair_sources import cnclip

TOWERS = {name: make_model(config) for name, config in CONFIGS.items()}
VISUAL, TRUNK = ["visual"], ["visual", "!projections"]


def stage(**keys: Any) -> Stage:
    return Recipe.of({"train": {"max_epochs": 1, "stages": [keys]}}).stages[0]


class Run:
    """A model in a stage, and the pixels that its image tower was given."""

    def __init__(self, folder: Path, tower: str = "vit", freezes: list[str] = VISUAL, **keys: Any) -> None:
        self.folder, self.stage = folder, stage(freeze=freezes, **keys)
        self.model = copy.deepcopy(TOWERS[tower])
        freeze(self.model, frozen_names(self.model, freezes))
        set_modes(self.model)
        config = self.model.config
        self.transform = ImageTransform(config.image_resolution, config.vision_mean, config.vision_std)
        self.precision, self.trunk, self.seen = "fp32", freezes == TRUNK, []

    def encoder(self) -> Encoder:
        tokenizer = Tokenizer(layouts.default_vocab())
        made = live_encoder(self.model, tokenizer, self.transform, torch.device("cpu"), self.precision, self.trunk)
        encode = made.backend.image

        def image(pixels: np.ndarray) -> np.ndarray:
            if pixels.any():  # a black one is asked for its size
                self.seen.append(pixels)
            return encode(pixels)

        made.backend.image = image
        return made

    def build(self, pairs: PairDataset, seed: int = 1, ranks: Ranks | None = None) -> FeatureCache:
        with evaluating(self.model):
            return FeatureCache.build(self.folder, self.encoder(), pairs, self.stage, seed, ranks or Ranks())

    def plain(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, D) of (B, r, r, 3), by the tower itself."""
        with torch.no_grad(), evaluating(self.model):
            return F.normalize(self.model.encode_image(self.transform.normalise(torch.from_numpy(pixels))), dim=-1)


def all_of(cache: FeatureCache, pairs: PairDataset) -> torch.Tensor:
    return cache(torch.arange(len(pairs)), torch.zeros(len(pairs), dtype=torch.long))


@pytest.fixture(scope="module")
def pairs(pictures: list[Path]) -> PairDataset:
    return read_pairs([(str(file), f"第{i}") for i, file in enumerate([*pictures, pictures[3], pictures[0]])])


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("tower", CONFIGS)
def test_kept_is_plain(tower: str, pairs: PairDataset, tmp_path: Path) -> None:
    run = Run(tmp_path, tower)
    cache = run.build(pairs)
    found = all_of(cache, pairs)
    assert found.shape == (14, 32)
    assert found.dtype == torch.float32
    close(found, run.plain(np.stack([run.transform.to_uint8(pairs[i].image) for i in range(14)])))
    assert torch.equal(found[0], found[13])
    assert np.load(cache.file).shape == (12, 32)  # a picture that is there twice is kept once
    assert cache(torch.tensor([5, 2]), torch.tensor([7, 8])).equal(found[[5, 2]])
    assert not cache.broken


@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_kept_trunk_is_plain(tower: str, pairs: PairDataset, tmp_path: Path) -> None:
    """Where the projection is trained: the same features and the same gradient, before and after it has moved."""
    run = Run(tmp_path, tower, TRUNK)
    cache = run.build(pairs)
    assert cache.trunk
    kept = all_of(cache, pairs)
    forward = PairForward(run.model, run.transform)
    pixels = torch.from_numpy(np.stack([run.transform.to_uint8(pairs[i].image) for i in range(14)]))
    text = torch.randint(1, 21128, (14, 5))
    (weight,) = (p for name, p in run.model.visual.named_parameters() if p.requires_grad)
    for _ in range(2):
        set_modes(run.model)
        grads = []
        for given in ({"pixels": pixels, "kept": None}, {"pixels": None, "kept": kept, "trunk": True}):
            image = forward(text=text, **given)[0]
            (image * torch.linspace(-1, 1, 32)).sum().backward()
            grads.append((image.detach(), weight.grad.clone()))
            weight.grad = None
        close(grads[0][0], grads[1][0])
        torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)
        weight.data += torch.randn_like(weight)


def test_patch_dropout_is_not_kept(pairs: PairDataset, tmp_path: Path) -> None:
    run = Run(tmp_path, "vit", TRUNK)
    wanted = all_of(run.build(pairs), pairs)
    run.model.set_patch_dropout(0.5)
    run.folder = tmp_path / "other"
    assert torch.equal(all_of(run.build(pairs), pairs), wanted)


def test_views(pairs: PairDataset, tmp_path: Path) -> None:
    run = Run(tmp_path, augmentation=True, cached_views=3)
    cache = run.build(pairs)
    pixels = np.concatenate(run.seen)
    assert len(pixels) == 36
    assert len({one.tobytes() for one in pixels}) == 36  # no view is like another
    close(torch.from_numpy(np.load(cache.file)), run.plain(pixels))
    rows = torch.arange(14)
    views = [cache(rows, torch.full((14,), view)) for view in range(9)]
    for one, two in ((0, 3), (1, 4), (2, 8)):
        assert torch.equal(views[one], views[two])
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert not (views[one] == views[two]).all(1).any()
    mixed = cache(torch.tensor([4, 4, 9]), torch.tensor([2**62 - 1, 1, 2]))
    assert torch.equal(mixed, torch.stack([views[(2**62 - 1) % 3][4], views[1][4], views[2][9]]))


def test_lower_precision_is_kept_in_fp32(pairs: PairDataset, tmp_path: Path) -> None:
    run = Run(tmp_path)
    exact = all_of(run.build(pairs), pairs)
    run.precision = "bf16"
    found = all_of(run.build(pairs), pairs)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("freezes", "keys", "tower", "says"),
    [
        (VISUAL, {}, "vit", None),
        (VISUAL, {}, "resnet", None),
        (TRUNK, {}, "vit", None),
        (TRUNK, {}, "timm", None),
        (["visual", "text"], {}, "vit", None),
        (VISUAL, {"augmentation": True, "cached_views": 2}, "vit", None),
        (TRUNK, {}, "resnet", "is trained"),
        ([], {}, "vit", "is trained"),
        (["visual:2"], {}, "vit", "is trained"),
        (["text"], {}, "timm", "is trained"),
        (VISUAL, {"cache_features": False}, "vit", "cache_features is false"),
        (VISUAL, {"augmentation": True}, "vit", "augmented afresh"),
        (VISUAL, {"augmentation": {"flip": 0.1}}, "vit", "augmented afresh"),
    ],
)
def test_when_features_are_kept(
    freezes: list[str], keys: dict[str, Any], tower: str, says: str | None, tmp_path: Path
) -> None:
    run = Run(tmp_path, tower, freezes, **keys)
    found = why_not(run.stage, run.model)
    assert found is None if says is None else says in found


# ---------------------------------------------------------------- computed once


def test_a_file_is_used_again(pairs: PairDataset, tmp_path: Path) -> None:
    wanted = all_of(Run(tmp_path).build(pairs), pairs)
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".json", ".npy"]
    again = Run(tmp_path)
    assert torch.equal(all_of(again.build(pairs, seed=2), pairs), wanted)  # nothing is drawn without augmentation
    other_words = read_pairs([(pairs[i].image, ["别", "的"]) for i in range(14)])
    assert torch.equal(all_of(again.build(other_words), pairs), wanted)
    again.model.text_projection.data += 1
    again.model.logit_scale.data += 1
    assert torch.equal(all_of(again.build(pairs), pairs), wanted)
    assert not again.seen
    assert sorted(tmp_path.iterdir()) == files


def test_a_trunk_is_used_again_whatever_its_projection(pairs: PairDataset, tmp_path: Path) -> None:
    Run(tmp_path, "vit", TRUNK).build(pairs)
    run = Run(tmp_path, "vit", TRUNK)
    run.model.visual.head.weight.data += 1
    run.build(pairs)
    assert not run.seen
    run = Run(tmp_path)  # the whole tower is another thing
    assert all_of(run.build(pairs), pairs).shape == (14, 32)
    assert run.seen


def other_weights(run: Run) -> None:
    run.model.visual.blocks[1].mlp.fc2.bias.data[3] += 1e-3


def other_statistics(run: Run) -> None:
    run.model.visual.trunk.bn1.running_mean += 1e-3


def other_transform(**keys: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        config = run.model.config
        mean, std = keys.get("mean", config.vision_mean), keys.get("std", config.vision_std)
        run.transform = ImageTransform(config.image_resolution, mean, std, exif=keys.get("exif", False))

    return change


def other_resolution(run: Run) -> None:
    run.model = make_model(type(run.model.config)(**{**run.model.config.__dict__, "image_resolution": 32}))
    run.model.visual.load_state_dict(
        {name: value for name, value in TOWERS["timm"].visual.state_dict().items()}  # noqa: C416
    )
    run.transform = ImageTransform(32, run.model.config.vision_mean, run.model.config.vision_std)


def other_stage(**keys: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.stage = stage(freeze=VISUAL, **keys)

    return change


@pytest.mark.parametrize(
    ("tower", "change"),
    [
        ("vit", other_weights),
        ("timm", other_statistics),
        ("timm", other_resolution),
        ("vit", other_transform(mean=(0.5, 0.5, 0.5))),
        ("vit", other_transform(std=(0.5, 0.5, 0.5))),
        ("vit", other_transform(exif=True)),
        ("vit", other_stage(augmentation=True, cached_views=1)),
    ],
)
def test_what_its_numbers_depend_on(tower: str, change: Any, pairs: PairDataset, tmp_path: Path) -> None:
    Run(tmp_path, tower).build(pairs)
    run = Run(tmp_path, tower)
    change(run)
    run.build(pairs)
    assert run.seen
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_augmentation_its_views_and_its_seed_count(pairs: PairDataset, tmp_path: Path) -> None:
    def computes(seed: int, **keys: Any) -> bool:
        run = Run(tmp_path, **keys)
        run.build(pairs, seed)
        return bool(run.seen)

    assert computes(1, augmentation={"flip": 0.1}, cached_views=1)
    assert not computes(1, augmentation={"flip": 0.1}, cached_views=1)
    assert computes(2, augmentation={"flip": 0.1}, cached_views=1)
    assert computes(1, augmentation={"flip": 0.2}, cached_views=1)
    assert computes(1, augmentation={"flip": 0.1}, cached_views=2)


def test_a_picture_file_that_changed(pictures: list[Path], tmp_path: Path) -> None:
    files = [Path(shutil.copy(file, tmp_path)) for file in pictures[:3]]
    pairs = read_pairs([(file, "猫") for file in files])
    run = Run(tmp_path / "kept")
    before = all_of(run.build(pairs), pairs)
    shutil.copy(pictures[7], files[1])
    run.seen.clear()
    after = all_of(run.build(pairs), pairs)
    assert run.seen
    assert (before == after).all(1).tolist() == [True, False, True]


def test_half_a_file_is_not_used(pairs: PairDataset, tmp_path: Path) -> None:
    """The notes come last, so without them, or without the array, it is computed again."""
    cache = Run(tmp_path).build(pairs)
    wanted = all_of(cache, pairs)
    for gone in (cache.file, cache.file.with_suffix(".json")):
        gone.unlink()
        run = Run(tmp_path)
        assert torch.equal(all_of(run.build(pairs), pairs), wanted)
        assert run.seen


class Made(Dataset):
    """Pictures without identities."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, str]:
        return np.asarray(ImageTransform(50).to_uint8(self.files[i])), "猫"


def test_data_without_identities(pictures: list[Path], tmp_path: Path) -> None:
    pairs = read_pairs(Made([pictures[0], pictures[1], pictures[0]]))
    run = Run(tmp_path)
    found = all_of(run.build(pairs), pairs)
    close(found, run.plain(np.stack([run.transform.to_uint8(pairs[i].image) for i in range(3)])))
    run.seen.clear()
    run.build(pairs)
    assert run.seen  # nobody knows whether they are still the same


# ---------------------------------------------------------------- broken pictures


@pytest.mark.parametrize("views", [1, 2])
def test_broken_pictures(views: int, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    keys = {} if views == 1 else {"augmentation": True, "cached_views": views}
    rows = [pictures[0], tmp_path / "bad.png", pictures[1], tmp_path / "gone.png", tmp_path / "bad.png"]
    pairs = read_pairs([(file, "猫") for file in rows])
    for _ in range(2):  # computed, and found again where that can be
        run = Run(tmp_path / "kept", **keys)
        cache = run.build(pairs)
        assert cache.broken == {1, 3, 4}
        assert cache.reasons == {1: "item 1 of list", 3: "item 3 of list", 4: "item 1 of list"}
        found = all_of(cache, pairs)
        assert found.isnan().any(1).tolist() == [False, True, False, True, True]


def test_broken_base64(data: bytes, tmp_path: Path) -> None:
    prefix = cnclip(
        tmp_path, [(1, data), (2, b"x"), (3, b"no picture")], [("a", [1]), ("b", [2]), ("c", [3])],
        encode=lambda one: b"!!!" if one == b"x" else base64.b64encode(one),
    )  # fmt: skip
    cache = Run(tmp_path / "kept").build(read_pairs(prefix))
    assert cache.broken == {1, 2}
    assert "train_imgs.tsv:2" in cache.reasons[1]
    assert "train_texts.jsonl:3" in cache.reasons[2]


# ---------------------------------------------------------------- ranks


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, number: int, shared: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(number, len(shared))
        self.shared, self.barrier = shared, barrier

    def wait(self) -> None:
        self.barrier.wait(30)

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.number] = value
        self.wait()
        values = list(self.shared)
        self.wait()
        return values

    def sum(self, values: list[float]) -> list[float]:
        return np.sum(self.gather(values), axis=0).tolist()


@contextmanager
def together(count: int) -> Iterator[Callable[[Callable[[Ranks], Any]], list[Any]]]:
    shared, barrier = [None] * count, threading.Barrier(count)

    def run(work: Callable[[Ranks], Any]) -> list[Any]:
        return list(pool.map(lambda number: work(Threads(number, shared, barrier)), range(count)))

    with ThreadPoolExecutor(count) as pool:
        yield run


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("keys", [{}, {"augmentation": True, "cached_views": 2}], ids=["plain", "views"])
def test_ranks_share_the_work(count: int, keys: dict[str, Any], pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pairs = read_pairs([(file, "猫") for file in [*pictures[:3], tmp_path / "bad.png", pictures[0]]])
    alone = Run(tmp_path / "alone", **keys).build(pairs)
    runs = [Run(tmp_path / "ranks", **keys) for _ in range(count)]
    with together(count) as start:
        caches = start(lambda ranks: runs[ranks.number].build(pairs, ranks=ranks))
    assert {cache.file.name for cache in caches} == {alone.file.name}
    for cache in caches:
        np.testing.assert_allclose(np.load(cache.file), np.load(alone.file), rtol=0, atol=1e-6)
        assert cache.reasons == alone.reasons
    shares = [sum(map(len, run.seen)) for run in runs]
    views = 2 if keys else 1
    assert sum(shares) == 3 * views
    assert max(shares) <= -(-4 * views // count)


def test_ranks_agree_on_data_without_identities(pictures: list[Path], tmp_path: Path) -> None:
    pairs = read_pairs(Made(pictures[:3]))
    runs = [Run(tmp_path) for _ in range(2)]
    with together(2) as start:
        one, two = start(lambda ranks: runs[ranks.number].build(pairs, ranks=ranks))
    assert one.file == two.file
    assert not all_of(one, pairs).isnan().any()


@pytest.mark.parametrize("there", [True, False])
def test_ranks_that_share_no_folder(there: bool, pairs: PairDataset, tmp_path: Path) -> None:
    if there:
        Run(tmp_path / "0").build(pairs)
    runs = [Run(tmp_path / str(number)) for number in range(2)]
    with together(2) as start, pytest.raises(OSError, match="ranks that share no folder need cache_features: false"):
        start(lambda ranks: runs[ranks.number].build(pairs, ranks=ranks))


def test_evaluating_gives_modes_back() -> None:
    model: ChineseCLIP = copy.deepcopy(TOWERS["timm"])
    freeze(model, frozen_names(model, ["visual:2", "text:1"]))
    set_modes(model)
    before = {name: module.training for name, module in model.named_modules()}

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
