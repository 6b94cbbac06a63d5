"""The loss: cn_clip's where nothing repeats, a plainly written one where something does, on one process and several."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelscope_cnclip.trainers.loss import clip_loss

from .loss_run import Towers, ours, result, upstream

ROOT = Path(__file__).parent.parent
SIZE, WIDTH, DIM = 12, 5, 7


def plain(
    image: Tensor, text: Tensor, scale: Tensor, image_ids: Any = None, text_ids: Any = None, smoothing: float = 0.0
) -> Tensor:
    """The same written out, pair by pair, in double."""
    image, text, scale, size = image.double(), text.double(), scale.double(), len(image)
    image_ids, text_ids = (list(range(size)) if ids is None else ids.tolist() for ids in (image_ids, text_ids))
    total = 0.0
    for here, there in ((image, text), (text, image)):
        for i in range(size):
            scores = torch.stack([scale * (here[i] * there[j]).sum() for j in range(size)])
            logs = scores - scores.exp().sum().log()
            same = [j for j in range(size) if image_ids[i] == image_ids[j] or text_ids[i] == text_ids[j]]
            hit = sum(logs[j] for j in same) / len(same)
            total = total - ((1 - smoothing) * hit + smoothing * logs.mean())
    return total / (2 * size)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SIZE, WIDTH, generator=generator) for name in ("image", "text")}


WEIGHT = torch.randn(DIM, WIDTH, generator=torch.Generator().manual_seed(9))
# Repeats within a rank and across ranks, of 2 and of 4: pairs 0 and 1 on one, 0 and 7 and 11 on several.
IMAGE_IDS = torch.tensor([1, 1, 2, 3, 4, 5, 6, 1, 8, 9, 10, 2**62])
TEXT_IDS = torch.tensor([1, 2, 3, 4, 5, 3, 7, 8, 2**62, 5, 11, 1])
CASES: dict[str, dict[str, Any]] = {
    "no repeats": {},
    "smoothing": {"options": {"label_smoothing": 0.2}},
    "own negatives": {"options": {"aggregate": False}},
    "captions": {"ids": {"text_ids": TEXT_IDS}},
    "pictures": {"ids": {"image_ids": IMAGE_IDS}},
    "both, smoothing": {"ids": {"image_ids": IMAGE_IDS, "text_ids": TEXT_IDS}, "options": {"label_smoothing": 0.1}},
    "all the same": {"ids": {"image_ids": torch.zeros(SIZE, dtype=torch.long)}},
}


def expected(case: dict[str, Any], parts: int = 1) -> dict[str, Tensor]:
    """Of the whole batch, or the mean over ``parts`` of it that know nothing of each other."""
    model, pair, ids = Towers(WEIGHT).double(), inputs(), case.get("ids", {})
    smoothing = case.get("options", {}).get("label_smoothing", 0.0)
    losses = []
    for rows in torch.arange(SIZE).chunk(parts):
        features = model(pair["image"][rows].double(), pair["text"][rows].double())
        losses.append(plain(*features, **{key: value[rows] for key, value in ids.items()}, smoothing=smoothing))
    return result(model, torch.stack(losses).mean())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() == {"loss", "shared.weight", "logit_scale"}
    for name, value in ours.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), theirs[name].double(), rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_repeats_it_is_cnclips(smoothing: float) -> None:
    mine, theirs, pair = Towers(WEIGHT), Towers(WEIGHT), inputs()
    ids = {"image_ids": torch.arange(SIZE), "text_ids": torch.arange(SIZE).flip(0)}
    loss = ours(mine, **pair, **ids, label_smoothing=smoothing)
    assert_same(result(mine, loss), result(theirs, upstream(theirs, **pair, smoothing=smoothing, aggregate=False)))


@pytest.mark.parametrize("name", CASES)
def test_one_process(name: str) -> None:
    case, model = CASES[name], Towers(WEIGHT)
    loss = ours(model, **inputs(), **case.get("ids", {}), **case.get("options", {}))
    assert loss.shape == ()
    assert_same(result(model, loss), expected(case))


def test_repeats_matter() -> None:
    """What is the same is no negative: pulling equal captions apart gains nothing."""
    same = F.normalize(torch.ones(4, DIM), dim=-1)
    scale = torch.tensor(10.0)
    assert clip_loss(same, same, scale, text_ids=torch.zeros(4, dtype=torch.long)).item() == pytest.approx(math.log(4))
    model, pair = Towers(WEIGHT), inputs()
    without, with_ids = (
        result(model, ours(model, **pair, text_ids=ids))["shared.weight"].clone() for ids in (None, TEXT_IDS)
    )
    assert (without - with_ids).abs().max() > 1e-3


def test_lower_precision_is_computed_in_fp32() -> None:
    pair = {name: F.normalize(value, dim=-1) for name, value in inputs().items()}
    half = {name: value.bfloat16() for name, value in pair.items()}
    loss = clip_loss(half["image"], half["text"], torch.tensor(50.0, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss == clip_loss(half["image"].float(), half["text"].float(), torch.tensor(50.0))


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Tensor]]]:
    """What each of four processes has to say, which are also two."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {
        name: {"tensors": inputs() | case.get("ids", {}), "options": case.get("options", {}), "weight": WEIGHT}
        for name, case in CASES.items()
    }
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-m", "tests.loss_run"]
    runs = [
        subprocess.Popen([*command, str(rank), "4", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_several_processes_are_one(name: str, count: int, ranks: list[dict[Any, dict[str, Tensor]]]) -> None:
    """The mean of the ranks' losses and DDP's mean of their gradients are those of the whole batch."""
    found = [rank[count, name] for rank in ranks[:count]]
    mean = found[0] | {"loss": torch.stack([one["loss"] for one in found]).mean()}
    whole = CASES[name].get("options", {}).get("aggregate", True)
    wanted = expected(CASES[name], 1 if whole else count)
    assert_same(mean, wanted)
    for one in found:
        assert torch.equal(one["shared.weight"], mean["shared.weight"])  # ranks don't drift apart
    if not whole:  # that it makes a difference
        assert abs(mean["loss"] - expected(CASES[name])["loss"]) > 1e-2


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "ids" not in case])
def test_several_processes_of_cnclip(name: str, count: int, ranks: list[dict[Any, dict[str, Tensor]]]) -> None:
    """cn_clip's ranks each compute the whole batch's loss; ours their share of it."""
    ours, theirs = ([rank[key] for rank in ranks[:count]] for key in ((count, name), (count, name, "cn_clip")))
    losses = [torch.stack([one["loss"] for one in side]).mean() for side in (ours, theirs)]
    assert_same(ours[0] | {"loss": losses[0]}, theirs[0] | {"loss": losses[1]})


def test_smoothing_is_torchs() -> None:
    """On one half of the loss alone, by hand."""
    pair = {name: F.normalize(value, dim=-1) for name, value in inputs().items()}
    logits = 7 * pair["image"] @ pair["text"].T
    entropy = nn.CrossEntropyLoss(label_smoothing=0.3)
    wanted = (entropy(logits, torch.arange(SIZE)) + entropy(logits.T, torch.arange(SIZE))) / 2
    found = clip_loss(pair["image"], pair["text"], torch.tensor(7.0), label_smoothing=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
