"""The paper's ablation at small size: from scratch, one stage, two stages, with the same CPU time for each.

    python examples/offline_data/build.py DATA …                  # the pairs, and the towers to start from
    python -m benchmarks.ablation DATA TOWERS OUT --pick --seconds 60     # settings: 20 minutes on one core
    python -m benchmarks.ablation DATA TOWERS OUT --seconds 150           # runs: half an hour; or draws again

Arms, after figure 3 of arXiv 2211.01335: ``scratch`` trains both towers from random weights; ``one-stage`` starts from
EfficientNet-Lite0 (ImageNet) and the small BERT, and trains both from the start; ``two-stage`` starts from the same,
keeps the image tower's trunk frozen (its features are computed once, and that time counts), then thaws it. Everything
else is equal: pairs, 64 pixels, batch 128, no augmentation, optimizer, schedule's shape, threads.

The budget is CPU time of the process at a fixed number of threads. A few steps of the real trainer, in rounds, say what
a step costs; that gives each arm its number of steps, so that its learning rates end where they should, and says when
to evaluate: the same in every run, whatever else the machine does meanwhile. What a run then really took is in the
table. Evaluation, checkpoints and plots don't count. Every arm has three candidates for its settings, picked by
text→image mean recall on the validation pairs with a seed of its own; the tests are looked at once, at the end of a
run. Runs that are finished are not run again.

OUT gets ``calibration.json``, ``picked.json``, a ``.jsonl`` per run, ``ablation.md`` and ``ablation.png``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority

from modelscope_cnclip.pairs import PairDataset, read_pairs
from modelscope_cnclip.trainers import evaluation
from modelscope_cnclip.trainers.live import evaluating, live_encoder
from modelscope_cnclip.trainers.trainer import CnclipTrainer

METRIC = "text_to_image_mean_recall"
VAL, TESTS = ("val_vendor", "val_unseen", "val_photos"), ("test_vendor", "test_unseen", "test_photos")
BATCH, RESOLUTION, EMBED_DIM, WARMUP, MARKS = 128, 64, 192, 0.1, 10
PICK_SEED = 0
# As many candidates for each arm; the second is taken where none was picked.
GRID: dict[str, list[dict[str, float]]] = {
    "scratch": [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3)],
    "one-stage": [{"lr": lr} for lr in (3e-4, 6e-4, 1.2e-3)],
    "two-stage": [  # share of the budget that is spent frozen
        {"lr_frozen": 5e-4, "lr": 3e-4, "share": 0.4},
        {"lr_frozen": 5e-4, "lr": 3e-4, "share": 0.7},
        {"lr_frozen": 1e-3, "lr": 6e-4, "share": 0.7},
    ],
}
COLOURS = {"scratch": "#8a8a8a", "one-stage": "#d1622b", "two-stage": "#1f6fb4"}
TITLES = {"test_vendor": "unseen vendor", "test_unseen": "unseen concepts", "test_photos": "photographs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path, help="folder with train.jsonl, val_*.jsonl, test_*.jsonl")
    parser.add_argument("towers", metavar="TOWERS", type=Path, help="folder with efficientnet_lite0.safetensors, bert/")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seconds", type=float, default=100, help="CPU seconds of training per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--pick", action="store_true", help="only try each arm's settings on the validation pairs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Ablation(args.data.resolve(), args.towers.resolve(), args.out, args.seconds, args.threads)
    if args.pick:
        for arm in args.arms:
            bench.pick(arm)
        return
    picked = bench.picked()
    runs = {arm: [bench.run(arm, picked[arm], seed) for seed in args.seeds] for arm in args.arms}
    table = bench.table(runs, picked)
    (args.out / "ablation.md").write_text(table, encoding="utf-8")
    draw(runs, args.seconds, args.out / "ablation.png")
    print("\n" + table)


class Ablation:
    """Runs of one budget on one machine, each in a file of its own."""

    def __init__(self, data: Path, towers: Path, out: Path, seconds: float, threads: int) -> None:
        self.data, self.towers, self.out, self.seconds, self.threads = data, towers, out, seconds, threads
        self.val = read_pairs([str(data / f"{name}.jsonl") for name in VAL])
        self.tests = {name: read_pairs(str(data / f"{name}.jsonl")) for name in TESTS}
        self.costs = self._calibration()

    # ------------------------------------------------------------------ what a step costs

    def _calibration(self) -> dict[str, float]:
        """CPU seconds of a frozen step, of a full step, and of computing the features to keep."""
        file = self.out / "calibration.json"
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["threads"] == self.threads:
                return known
        rounds: list[dict[str, float]] = []
        for _ in range(3):
            frozen, full = stage(1e-4, 14, frozen=True), stage(1e-4, 6)
            clock = Clock()
            with Opened(self, "two-stage", [frozen, full], PICK_SEED, clock) as trainer:
                clock.start()
                trainer.train()
            steps = [[s for at, s in clock.steps if at == i][2:] for i in (0, 1)]  # the first ones allocate
            rounds.append(dict(zip(("features", "frozen", "full"), (clock.fixed, *map(statistics.fmean, steps)))))
        costs = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        costs |= {"threads": self.threads, "precision": trainer.precision, "rounds": rounds}
        save_json(costs, file)
        print(f"CPU seconds: {costs}", flush=True)
        return costs

    def stages(self, arm: str, setting: dict[str, float]) -> list[dict[str, Any]]:
        """The arm's stages, as long as the budget allows.

        Raises:
            SystemExit: the budget is shorter than what the features alone cost.
        """
        if arm != "two-stage":
            return [stage(setting["lr"], round(self.seconds / self.costs["full"]))]
        frozen = (setting["share"] * self.seconds - self.costs["features"]) / self.costs["frozen"]
        full = (1 - setting["share"]) * self.seconds / self.costs["full"]
        if frozen < 1 or full < 1:
            raise SystemExit(
                f"--seconds {self.seconds:g}: too short for two stages: computing the features takes "
                f"{self.costs['features']:.1f}, a full step {self.costs['full']:.1f} CPU seconds"
            )
        return [stage(setting["lr_frozen"], round(frozen), frozen=True), stage(setting["lr"], round(full))]

    # ------------------------------------------------------------------ runs

    def pick(self, arm: str) -> None:
        """Try the arm's settings, and note the best on the validation pairs."""
        scores = []
        for setting in GRID[arm]:
            run = self.run(arm, setting, PICK_SEED, tests=False)
            scores.append(run["final"]["val"])
        best = int(np.argmax(scores))
        noted = self.picked(noted_only=True)
        values = dict(zip(map(label, GRID[arm]), scores))
        noted[arm] = {"setting": GRID[arm][best], "val": values, "seed": PICK_SEED, "seconds": self.seconds}
        save_json(noted, self.out / "picked.json")
        print(f"{arm}: picked {label(GRID[arm][best])}", flush=True)

    def picked(self, noted_only: bool = False) -> dict[str, Any]:
        """arm -> setting; with ``noted_only`` what picked.json holds."""
        file = self.out / "picked.json"
        noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return noted if noted_only else {arm: noted[arm]["setting"] if arm in noted else GRID[arm][1] for arm in GRID}

    def run(self, arm: str, setting: dict[str, float], seed: int, tests: bool = True) -> dict[str, Any]:
        """One training: from its file if it is finished, else now. ``{"start", "points", "final"}``."""
        file = self.out / f"{arm}_{label(setting)}_seed{seed}.jsonl"
        stages = self.stages(arm, setting)
        start = {"arm": arm, "setting": setting, "seed": seed, "seconds": self.seconds, "threads": self.threads,
                 "steps": [one["max_steps"] for one in stages]}  # fmt: skip
        if (done := read_run(file)) is not None and done["start"] == start:
            return done
        with file.open("w", encoding="utf-8") as log:
            log.write(json.dumps(start) + "\n")
            clock, wall = Clock(self, log), time.perf_counter()
            with Opened(self, arm, stages, seed, clock) as trainer:
                clock.evaluate(trainer)
                clock.start()
                trainer.train()
                clock.evaluate(trainer)
                final = {"cpu": round(clock.used, 2), "wall": round(time.perf_counter() - wall, 1),
                         "switch": clock.switch, "val": clock.last}  # fmt: skip
                if tests:
                    final |= {name: score(trainer, pairs) for name, pairs in self.tests.items()}
            log.write(json.dumps({"final": final}) + "\n")
        print(f"{file.stem}: {final}", flush=True)
        return read_run(file)

    # ------------------------------------------------------------------ the table

    def table(self, runs: dict[str, list[dict[str, Any]]], picked: dict[str, Any]) -> str:
        pools = [("val", self.val), *self.tests.items()]
        sizes = {name: len({pairs.image_key(i) for i in range(len(pairs))}) for name, pairs in pools}
        heads = " | ".join(f"{name} (n={sizes[name]})" for name, _ in pools)
        seeds = len(next(iter(runs.values())))
        lines = [
            f"Text→image mean recall (of R@1, 5, 10) in %, mean ± standard deviation over {seeds} seeds; "
            f"{self.seconds:g} CPU seconds of training a run, {self.threads} thread(s), {self.costs['precision']}.",
            "",
            f"| arm | setting | steps | CPU seconds taken | wall-clock | {heads} |",
            "|---|---|---|---|---|" + "---|" * len(pools),
        ]
        for arm, done in runs.items():
            finals = [run["final"] for run in done]
            cells = [spread([100 * final[name] for final in finals]) for name, _ in pools]
            steps = " + ".join(map(str, done[0]["start"]["steps"]))
            cpu, wall = (spread([final[key] for final in finals]) for key in ("cpu", "wall"))
            lines.append(f"| {arm} | {label(picked[arm])} | {steps} | {cpu} | {wall} | {' | '.join(cells)} |")
        chance = (f"{100 * np.mean([min(1, k / sizes[name]) for k in (1, 5, 10)]):.1f}" for name, _ in pools)
        lines += [f"| chance | | | | | {' | '.join(chance)} |", ""]
        costs, noted = self.costs, self.picked(noted_only=True).values()
        how = (
            f"with another seed and {max(one['seconds'] for one in noted):g} CPU seconds a run" if noted else "nowhere"
        )
        lines.append(
            f"By calibration a frozen step costs {1000 * costs['frozen']:.0f} ms of CPU time, a full step "
            f"{1000 * costs['full']:.0f} ms, the features {costs['features']:.1f} s (counted). Pictures of "
            f"{RESOLUTION} pixels, batch {BATCH}, {EMBED_DIM} dimensions, no augmentation. Wall-clock is of a shared "
            f"machine and includes evaluation. Settings were picked on val {how}; the tests were looked at once."
        )
        return "\n".join(lines) + "\n"


class Opened:
    """A trainer in a work dir of its own, which goes when the context ends: features are paid for in every run."""

    def __init__(self, bench: Ablation, arm: str, stages: list[dict[str, Any]], seed: int, clock: Clock) -> None:
        self.bench, self.arm, self.stages, self.seed, self.clock = bench, arm, stages, seed, clock

    def __enter__(self) -> CnclipTrainer:
        bench, self.folder = self.bench, Path(tempfile.mkdtemp(prefix="run_", dir=self.bench.out))
        vision = {"timm": "tf_efficientnet_lite0", "resolution": RESOLUTION, "mean": [0.5] * 3, "std": [0.5] * 3}
        bert = bench.towers / "bert"
        if self.arm == "scratch":
            bert = random_bert(bert, self.folder / "bert", self.seed)
        else:
            vision["weights"] = str(bench.towers / "efficientnet_lite0.safetensors")
        recipe = {
            "task": "multi-modal-embedding",
            "pretrained_model": {"vision": vision, "text": {"bert": str(bert)}, "embed_dim": EMBED_DIM},
            "dataset": {"train": str(bench.data / "train.jsonl")},
            "train": {
                "work_dir": str(self.folder / "work"),
                "seed": self.seed,
                "precision": "fp32",  # bf16 is slower here: the backward pass of depthwise convolutions on CPUs
                "optimizer": {"weight_decay": 0.05},
                "loss_cfg": {"label_smoothing": 0.1},
                "dataloader": {"batch_size_per_gpu": BATCH},
                "logging": {"interval": 50},
                "checkpoint": {"period": {"interval": 10**6}},
                "stages": self.stages,
            },
        }
        save_json(recipe, self.folder / "recipe.json")
        return CnclipTrainer(cfg_file=str(self.folder / "recipe.json"), callbacks=[self.clock], device="cpu")

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Clock(Hook):
    """What training has cost; evaluates and notes the result at every tenth of the budget.

    Attributes:
        used: CPU seconds so far, without evaluation, checkpoints and plots.
        fixed: of them, before the first step: what it takes to enter the first stage, kept features among it.
        steps: (stage, CPU seconds) of every step with its data.
        spent: what the same should have taken by the calibration.
        switch: ``spent`` at the start of the second stage.
        last: of the last evaluation.
    """

    PRIORITY = Priority.LOWEST  # behind the trainer's own hooks: what they do in a step counts

    def __init__(self, bench: Ablation | None = None, log: Any = None) -> None:
        self.bench, self.log = bench, log
        self.used, self.fixed, self.spent, self.switch, self.last = 0.0, 0.0, 0.0, None, 0.0
        self.steps: list[tuple[int, float]] = []
        self._mark: float | None = None

    def start(self) -> None:
        self._mark = time.process_time()

    def before_train_epoch(self, trainer: CnclipTrainer) -> None:
        if self._mark is None:
            self.start()
        elif not self.steps:
            self.fixed = self._take()
            self.start()
            if self.bench is not None and trainer.cache is not None:
                self.spent = self.bench.costs["features"]
        if trainer.progress.stage and self.switch is None:
            self.switch = round(self.spent, 2)

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        self.steps.append((trainer.progress.stage, self._take()))
        if self.bench is not None:
            before, tenth = self.spent, self.bench.seconds / MARKS
            self.spent += self.bench.costs["full" if trainer.cache is None else "frozen"]
            if int(before / tenth) < int(self.spent / tenth) and trainer.progress.step < trainer.max_iters:
                self.evaluate(trainer)
        self.start()

    def after_train_epoch(self, trainer: CnclipTrainer) -> None:
        self._mark = None  # behind this lie checkpoints and plots

    def evaluate(self, trainer: CnclipTrainer) -> None:
        self.last = score(trainer, self.bench.val)
        progress = trainer.progress
        point = {"spent": round(self.spent, 2), "cpu": round(self.used, 2), "step": progress.step,
                 "stage": progress.stage, "val": self.last}  # fmt: skip
        if progress.step:
            point["loss"] = round(trainer.train_outputs["loss"], 4)
        self.log.write(json.dumps(point) + "\n")
        self.log.flush()

    def _take(self) -> float:
        seconds = time.process_time() - self._mark
        self.used += seconds
        return seconds


def stage(lr: float, steps: int, *, frozen: bool = False) -> dict[str, Any]:
    schedule = {"name": "cosine", "warmup_proportion": WARMUP}
    out = {"name": "full", "lr": lr, "max_steps": steps, "lr_scheduler": schedule}
    return out | {"name": "frozen", "freeze": ["visual", "!projections"]} if frozen else out


def score(trainer: CnclipTrainer, pairs: PairDataset) -> float:
    """Text→image mean recall of the present weights, as a share of 1."""
    encoder = live_encoder(trainer.towers, trainer.tokenizer, trainer.transform, trainer.device, trainer.precision)
    with evaluating(trainer.towers):
        images, texts, captions = evaluation.pool_features(encoder, pairs, 64, trainer.ranks)
    metric = evaluation.RetrievalRecallMetric()
    evaluation.feed([metric], pairs, images, texts, captions, 64)
    return round(metric.evaluate()[METRIC], 5)


def random_bert(like: Path, folder: Path, seed: int) -> Path:
    """A BERT of the same shape with random weights, as transformers initialises it, and the same vocabulary."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(BertConfig.from_pretrained(like), add_pooling_layer=False).save_pretrained(folder)
    shutil.copy(like / "vocab.txt", folder)
    return folder


def label(setting: dict[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in setting.items())


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def save_json(values: Any, file: Path) -> None:
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run(file: Path) -> dict[str, Any] | None:
    """A finished run, None if there is none."""
    lines = [json.loads(line) for line in complete_lines(file)]
    if not lines or "final" not in lines[-1]:
        return None
    return {"start": lines[0], "points": lines[1:-1], "final": lines[-1]["final"]}


def complete_lines(file: Path) -> Iterator[str]:
    if file.exists():
        yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}"))


def draw(runs: dict[str, list[dict[str, Any]]], seconds: float, file: Path) -> None:
    """Recall on the validation pairs over CPU seconds, and on the tests at the end; bands are ± one deviation."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=130)
    curves, tests = figure.subplots(1, 2, width_ratios=[1.45, 1])
    for arm, done in runs.items():
        colour = COLOURS[arm]
        spent = [point["spent"] for point in done[0]["points"]]  # the same in every seed
        values = np.array([[100 * point["val"] for point in run["points"]] for run in done])
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(spent))
        curves.plot(spent, mean, ".-", color=colour, lw=2, ms=6, label=arm)
        curves.fill_between(spent, mean - deviation, mean + deviation, color=colour, alpha=0.18, lw=0)
        switch = done[0]["final"]["switch"]
        if switch is not None:
            curves.axvline(switch, color=colour, lw=1, ls=(0, (4, 3)), zorder=0)
            curves.text(switch, 1.01, "image tower thaws", color=colour, fontsize=9, ha="center", va="bottom",
                        transform=curves.get_xaxis_transform())  # fmt: skip
    curves.set_xlim(0, seconds * 1.02)
    curves.set_ylim(bottom=0)
    curves.set_xlabel("CPU seconds of training")
    curves.set_ylabel("text→image mean recall on validation, %")
    curves.legend(frameon=False, loc="upper left")
    width = 0.8 / len(runs)
    for place, (arm, done) in enumerate(runs.items()):
        for i, name in enumerate(TESTS):
            values = [100 * run["final"][name] for run in done]
            x = i + (place - (len(runs) - 1) / 2) * width
            tests.bar(x, statistics.fmean(values), width * 0.86, color=COLOURS[arm], alpha=0.75)
            tests.plot([x] * len(values), values, ".", color="black", ms=4, alpha=0.7)
    tests.set_xticks(range(len(TESTS)), [TITLES[name] for name in TESTS])
    tests.set_ylabel("text→image mean recall on the tests, %")
    for axes in (curves, tests):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(file)


if __name__ == "__main__":
    main()
