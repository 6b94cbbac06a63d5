"""What a person reads while a model trains: a line per interval, ``metrics.jsonl``, ``curves.png``, TensorBoard.

``metrics.jsonl`` has a line per interval and per evaluation, each with the step, pass and stage. A run that is resumed
drops the lines behind its checkpoint, so each step is in it once.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority

from modelscope_cnclip import registry

if TYPE_CHECKING:
    from .trainer import CnclipTrainer

METRICS, CURVES = "metrics.jsonl", "curves.png"


@registry.register
class CnclipLogHook(Hook):
    """Logs. The trainer registers it by itself.

    Args:
        interval: optimizer steps between two lines.
        tensorboard: write ``tensorboard/`` in the work dir too.
    """

    PRIORITY = Priority.BELOW_NORMAL  # behind the evaluation, before the stage is left

    def __init__(self, interval: int = 10, tensorboard: bool = False) -> None:
        self.interval, self.tensorboard = interval, tensorboard
        self._board: Any = None
        self._told = False
        self._clear()

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._pairs = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def before_run(self, trainer: CnclipTrainer) -> None:
        self._start, self._first_step, self._cut = time.perf_counter(), trainer.progress.step, 0
        if not trainer.ranks.first:
            return
        file = Path(trainer.work_dir) / METRICS
        lines = [line for line in read_metrics(file) if line["step"] <= trainer.progress.step]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "train.logging.tensorboard needs tensorboard: pip install 'modelscope-cnclip[train]'"
                ) from error
            self._board = SummaryWriter(Path(trainer.work_dir) / "tensorboard", purge_step=trainer.progress.step + 1)

    def before_train_epoch(self, trainer: CnclipTrainer) -> None:
        self._clear()
        self._left = time.perf_counter()

    def before_train_iter(self, trainer: CnclipTrainer) -> None:
        self._waited += time.perf_counter() - self._left
        trainer.wants_norm = (trainer.progress.step + 1) % self.interval == 0

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        self._left = time.perf_counter()
        outputs, progress = trainer.train_outputs, trainer.progress
        self._losses.append(outputs["loss"])
        self._pairs += outputs["pairs"]
        self._cut += outputs["cut"]
        if trainer.ranks.first and progress.step % self.interval == 0:
            self._line(trainer, outputs)
            self._clear()
        if trainer.new_metrics:
            self._evaluation(trainer)

    def after_train_epoch(self, trainer: CnclipTrainer) -> None:
        if trainer.new_metrics:
            self._evaluation(trainer)
        if self._cut:
            trainer.logger.warning(
                f"{self._cut} captions of this pass were cut to {trainer.tokenizer.context_length} tokens"
            )
            self._cut = 0
        if trainer.ranks.first and draw(Path(trainer.work_dir)) is None and not self._told:
            trainer.logger.info(f"{CURVES} needs matplotlib: pip install 'modelscope-cnclip[train]'")
            self._told = True

    def after_run(self, trainer: CnclipTrainer) -> None:
        if self._board is not None:
            self._board.close()

    def _line(self, trainer: CnclipTrainer, outputs: dict[str, Any]) -> None:
        progress, seconds = trainer.progress, time.perf_counter() - self._since
        loss, rate = sum(self._losses) / len(self._losses), self._pairs / seconds
        self._write(trainer, {
            "loss": loss, "logit_scale": outputs["logit_scale"], "lr": outputs["lr"], "grad_norm": outputs["grad_norm"],
            "pairs_per_second": round(rate, 2), "data_wait": round(self._waited / seconds, 4),
        })  # fmt: skip
        done = progress.step - self._first_step
        left = (time.perf_counter() - self._start) / max(1, done) * (trainer.max_iters - progress.step)
        rates = ", ".join(f"{name} {value:.2e}" for name, value in _by_tower(outputs["lr"]).items())
        trainer.logger.info(
            f"{trainer.stage.name} pass {progress.passes + 1} step {progress.stage_step}/{trainer.stage_steps}"
            f" | loss {loss:.4f} | scale {outputs['logit_scale']:.2f} | lr {rates} | grad {outputs['grad_norm']:.3g}"
            f" | {rate:.1f} pairs/s | data wait {self._waited / seconds:.0%} | ETA {timedelta(seconds=round(left))}"
        )

    def _evaluation(self, trainer: CnclipTrainer) -> None:
        if not trainer.ranks.first:
            return
        metrics = trainer.new_metrics
        self._write(trainer, {"metrics": metrics})
        told = {name: value for name, value in metrics.items() if name.endswith(("recall@1", "mean_recall"))} or metrics
        trainer.logger.info("evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in told.items()))

    def _write(self, trainer: CnclipTrainer, values: dict[str, Any]) -> None:
        progress = trainer.progress
        line = {"step": progress.step, "stage": trainer.stage.name, "pass": progress.epoch, **values}
        with (Path(trainer.work_dir) / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                for part, number in value.items() if isinstance(value, dict) else ((None, value),):
                    if number is not None:
                        self._board.add_scalar(f"{name}/{part}" if part else name, number, progress.step)


def _by_tower(rates: dict[str, float]) -> dict[str, float]:
    """One rate for groups that differ only in weight decay."""
    out: dict[str, float] = {}
    for name, rate in rates.items():
        if rate not in out.values():
            out[name.split(", no decay")[0]] = rate
    return out if len(out) > 1 else {"": next(iter(out.values()))}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last one that a killed run left unfinished is passed over."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def draw(work_dir: Path) -> Path | None:
    """``curves.png`` from ``metrics.jsonl``: loss, temperature, learning rates and recall over steps, stages shaded.

    Returns:
        The file, or None where matplotlib (extra ``train``) isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_metrics(work_dir / METRICS)
    training, evaluations = ([line for line in lines if key in line] for key in ("loss", "metrics"))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    loss, scale, rate, recall = figure.subplots(2, 2, sharex=True).flat
    steps = [line["step"] for line in training]
    loss.plot(steps, [line["loss"] for line in training])
    scale.plot(steps, [line["logit_scale"] for line in training])
    rates: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in training:
        for name, value in _by_tower(line["lr"]).items():
            rates[name].append((line["step"], value))
    for name, points in rates.items():
        rate.plot(*zip(*points), label=name or None, marker="." if len(points) == 1 else None)
    for name in ("text_to_image_mean_recall", "image_to_text_mean_recall"):
        points = [(line["step"], 100 * line["metrics"][name]) for line in evaluations if name in line["metrics"]]
        if points:
            recall.plot(*zip(*points), marker=".", label=name.removesuffix("_mean_recall").replace("_", " "))
    for axes, title in ((loss, "loss"), (scale, "logit scale"), (rate, "learning rate"), (recall, "mean recall, %")):
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        _shade(axes, lines)
    for axes in (rate, recall):
        axes.set_xlabel("optimizer step")
    target = work_dir / CURVES
    temporary = target.with_name(f".{CURVES}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(target)
    return target


def _shade(axes: Any, lines: list[dict[str, Any]]) -> None:
    spans: dict[str, list[int]] = {}
    for line in lines:
        spans.setdefault(line["stage"], []).append(line["step"])
    start = 0
    for number, (name, steps) in enumerate(spans.items()):
        end = max(steps)
        axes.axvspan(start, end, color="C0" if number % 2 == 0 else "C1", alpha=0.06, lw=0)
        if axes.get_title(loc="left") == "loss":
            axes.text(start, 0.98, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="0.35")
        start = end
