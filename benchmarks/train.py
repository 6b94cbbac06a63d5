"""Seconds per optimizer step beside cn_clip, ViT-B/16 + RoBERTa-base, on a CPU: one run, one table.

    pip install -e '.[test]' && pip install --no-deps cn_clip==1.6.0
    python -m benchmarks.train                        # about 15 minutes on 2 cores
    python -m benchmarks.train --quick --json OUT     # fewer rounds

Both sides have the same random weights, the same 32 pairs and batch 16, and take turns in one process. cn_clip runs its
own ``train()`` with the model, DistributedDataParallel and AdamW as its ``main.py`` builds them, in fp32 with texts
padded to 52; so that it runs on a CPU, ``.cuda()`` does nothing and the one process talks gloo. Ours runs
``CnclipTrainer.train()``, with a hook that looks at the clock before and after each step.

Loading is left out on both sides: cn_clip finds normalised pixels in memory; ours finds pixels as uint8 and normalises
them within the step, or, where features are kept, reads these from their file within the step. Augmentation is off.
Medians of the steps of all rounds, without the first of each round, which allocates. Memory is what a round adds to
what was there before it: gradients, optimizer state, activations. On a machine with other work, ``--threads 1`` and the
ratio of CPU time say more than the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority
from PIL import Image
from torch import Tensor, nn

from modelscope_cnclip import keymaps, layouts
from modelscope_cnclip.backends import cpu_has_bf16
from modelscope_cnclip.checkpoint import Checkpoint
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.towers import ChineseCLIP, TowerConfig
from modelscope_cnclip.trainers.trainer import CnclipTrainer

from .encode import HERE, machine

BATCH, LR, WEIGHT_DECAY = 16, 5e-5, 1e-3
# What is measured: group -> row -> keys of our stage, and the ratio it is held to at the default precision.
GROUPS: dict[str, dict[str, tuple[dict[str, Any], float]]] = {
    "stage 1": {
        "features kept": ({"freeze": ["visual"]}, 15.0),
        "features not kept": ({"freeze": ["visual"], "cache_features": False}, 4.0),
    },
    "full step": {"": ({}, 3.8)},
}

Seconds = tuple[float, float]  # by the clock, and of CPU time of all threads
Round = Callable[[int], list[Seconds]]  # number of steps -> of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 steps instead of 4 of 3")
    parser.add_argument("--only", choices=GROUPS, help="one of the groups of rows")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures as JSON")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    rounds, steps = (2, 2) if args.quick else (4, 3)
    print(machine() + "\n", flush=True)
    figures = {"machine": machine(), "threads": torch.get_num_threads(), "rounds": rounds, "steps": steps}
    groups = [args.only] if args.only else list(GROUPS)
    figures["rows"] = compare(TowerConfig.named("vit-b-16"), rounds, steps, groups)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(
    config: TowerConfig, rounds: int, steps: int, groups: Sequence[str] = tuple(GROUPS)
) -> list[dict[str, Any]]:
    """Measure every row and print the table.

    Args:
        config: towers of both sides.
        rounds: how often every side has its turn.
        steps: that are counted in one.
        groups: of rows.
    """
    torch.manual_seed(0)
    start = Checkpoint.of(ChineseCLIP(config), layouts.default_vocab())
    model = CnclipModel(str(start.path), loaded=start).float()
    precisions = ("bf16", "fp32") if cpu_has_bf16() else ("fp32",)  # the first is the default
    rows: list[dict[str, Any]] = []
    heads = ("", "", "s / step", "× cn_clip", "held to", "CPU s / step", "× cn_clip", "MiB in a step")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    with tempfile.TemporaryDirectory() as folder, one_process(Path(folder)):
        pairs = make_pairs(config)
        for group in groups:
            variants = GROUPS[group]
            sides = {"cn_clip fp32": cn_clip_side(model, pairs, freeze_vision=group == "stage 1")}
            held = {}
            for precision in precisions:
                for variant, (stage, target) in variants.items():
                    name = f"ours {precision}{variant and ', '}{variant}"
                    sides[name] = our_side(model, pairs, stage, precision, Path(folder) / f"{group} {name}")
                    held[name] = target if precision == precisions[0] else None
            rows += measure(group, sides, held, rounds, steps)
            del sides  # the next group's cn_clip needs the room
            gc.collect()
    return rows


def measure(
    group: str, sides: dict[str, Round], held: dict[str, float | None], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Rows of one group: the sides take turns, then the medians are printed."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()
            before = reset_peak()
            seconds[name] += side(steps + 1)[1:]
            memory[name] = peak() - before
    medians = {name: [statistics.median(values) for values in zip(*both)] for name, both in seconds.items()}
    base, rows = medians["cn_clip fp32"], []
    for name, (wall, cpu) in medians.items():
        target = held.get(name)
        row = {"group": group, "name": name, "seconds": wall, "ratio": base[0] / wall, "held to": target, "CPU": cpu,
               "CPU ratio": base[1] / cpu, "MiB": memory[name], "all": seconds[name]}  # fmt: skip
        rows.append(row)
        print(
            f"| {group} | {name} | {wall:.3f} | {row['ratio']:.2f} | {f'≥ {target:g}' if target else ''} "
            f"| {cpu:.3f} | {row['CPU ratio']:.2f} | {row['MiB']:.0f} |",
            flush=True,
        )
    return rows


Pairs = list[tuple[bytes, str]]


def make_pairs(config: TowerConfig) -> Pairs:
    """Noise for pictures, as PNG, and the captions of ``captions.txt``; whole batches."""
    rng, size = np.random.default_rng(0), config.image_resolution
    captions = (HERE / "captions.txt").read_text(encoding="utf-8").splitlines()
    pairs = []
    for caption in captions[: len(captions) // BATCH * BATCH]:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
        pairs.append((file.getvalue(), caption))
    return pairs


# ---------------------------------------------------------------------- cn_clip


def cn_clip_side(model: CnclipModel, pairs: Pairs, freeze_vision: bool) -> Round:
    """cn_clip's training with this model's weights, as ``cn_clip/training/main.py`` sets it up."""
    from cn_clip.clip import tokenize
    from cn_clip.clip.model import CLIP
    from cn_clip.training.scheduler import cosine_lr
    from cn_clip.training.train import train

    towers = model.clip_model
    theirs = CLIP(**cn_clip_shapes(towers.config))
    state = keymaps.from_towers(towers.state_dict())
    report = theirs.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=False)
    assert not report.unexpected_keys, report
    theirs.float()
    if freeze_vision:
        for parameter in theirs.visual.parameters():
            parameter.requires_grad = False
    parallel = nn.parallel.DistributedDataParallel(theirs)
    named = [(name, p) for name, p in parallel.named_parameters() if p.requires_grad]
    plain = {name for name, _ in named if any(part in name for part in ("bn", "ln", "bias", "logit_scale"))}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
            {"params": [p for name, p in named if name not in plain], "weight_decay": WEIGHT_DECAY},
        ],
        lr=LR, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    args = Namespace(
        accum_freq=1, aggregate=True, distillation=False, freeze_vision=freeze_vision, gather_with_grad=False,
        local_device_rank=0, log_interval=10**9, mask_ratio=0, max_steps=10**9, precision="fp32", rank=0,
        report_training_batch_acc=False, save_step_frequency=-1, should_save=False, val_data=None,
        valid_step_interval=None, vision_model="ViT-B-16", world_size=1,
    )  # fmt: skip
    mean, std = (torch.tensor(x)[:, None, None] for x in (towers.config.vision_mean, towers.config.vision_std))
    batches = []
    for i in range(0, len(pairs), BATCH):
        images, texts = zip(*pairs[i : i + BATCH])
        arrays = [np.array(Image.open(io.BytesIO(image))) for image in images]
        pixels = torch.stack([(torch.from_numpy(array).permute(2, 0, 1) / 255 - mean) / std for array in arrays])
        tokens = tokenize(list(texts), context_length=52)
        batches.append((pixels.contiguous(), tokens, tokens.argmin(1)))

    def turn(steps: int) -> list[Seconds]:
        loader = TimedBatches(batches, steps)
        train(parallel, {"train": Namespace(dataloader=loader, sampler=None)}, 0, optimizer, None,
              cosine_lr(optimizer, LR, 0, 10**6), args, 0)  # fmt: skip
        optimizer.state.clear()
        optimizer.zero_grad()
        return loader.seconds()

    return turn


class TimedBatches:
    """A loader for cn_clip that notes when it is asked: a step lasts from one batch to the question for the next."""

    def __init__(self, batches: list[tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, steps, steps * BATCH
        self.marks: list[Seconds] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i in range(self.num_batches):
            self.marks.append(now())
            yield self.batches[i % len(self.batches)]

    def seconds(self) -> list[Seconds]:
        return [since(start, end) for start, end in zip(self.marks, [*self.marks[1:], now()])]


def cn_clip_shapes(config: TowerConfig) -> dict[str, Any]:
    """Keywords of cn_clip's CLIP."""
    unknown = ("vision_timm", "vision_mean", "vision_std", "context_length")
    return {name: value for name, value in asdict(config).items() if name not in unknown}


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A gloo group of one, and ``.cuda()`` that leaves everything where it is: what cn_clip needs on a CPU."""
    before = Tensor.cuda, nn.Module.cuda
    Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    dist.init_process_group("gloo", init_method=f"file://{(folder / 'meet').absolute()}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        Tensor.cuda, nn.Module.cuda = before


# ---------------------------------------------------------------------- ours


def our_side(model: CnclipModel, pairs: Pairs, stage: dict[str, Any], precision: str, work_dir: Path) -> Round:
    """Steps of a CnclipTrainer, a new one in each turn; all share the model, and one work dir its kept features."""
    work_dir.mkdir()
    recipe = {
        "task": "multi-modal-embedding",
        "train": {
            "work_dir": str(work_dir),
            "precision": precision,
            "dataloader": {"batch_size_per_gpu": BATCH},
            "logging": {"interval": 10**6},
            "stages": [stage | {"max_steps": 10**6, "lr": LR, "weight_decay": WEIGHT_DECAY}],
        },
    }
    file = work_dir / "recipe.json"
    file.write_text(json.dumps(recipe), encoding="utf-8")

    def turn(steps: int) -> list[Seconds]:
        timer = StepTimer(steps)
        trainer = CnclipTrainer(model, str(file), train_dataset=pairs, device="cpu", callbacks=[timer])
        with contextlib.suppress(Enough):
            trainer.train()
        for parameter in model.parameters():
            parameter.grad = None
        return timer.seconds

    return turn


class Enough(Exception):
    """Ends a run in the middle, before it writes a checkpoint of gigabytes."""


class StepTimer(Hook):
    """Seconds of each of the first steps, without loading and without other hooks' work behind the step."""

    PRIORITY = Priority.HIGHEST

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[Seconds] = []

    def before_train_iter(self, trainer: CnclipTrainer) -> None:
        self.start = now()

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        self.seconds.append(since(self.start, now()))
        if len(self.seconds) == self.steps and not trainer.interrupted:  # a SIGTERM ends the whole program
            raise Enough


# ---------------------------------------------------------------------- time and memory


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]


def reset_peak() -> float:
    """Start counting peak memory anew where Linux allows it. Returns MiB resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
    return float("nan")


if __name__ == "__main__":
    main()
