"""What a training run shows while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]

LINE_SECONDS = 1.0
"""Without a terminal a line is printed at most this often, and for the last evaluation."""


class TrainingProgress:
    """A context manager; `update` moves the bar, `report` shows an evaluation. One that is `quiet` shows nothing."""

    def __init__(self, start: int, num_steps: int, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.num_steps, self.printed = num_steps, time.monotonic()
        self.paced: tuple[float, int] | None = None
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=num_steps, completed=start, text="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the training numbers of the last steps: a row of metrics.jsonl."""
        text = (
            f"{row['images_per_s']:,.0f} images/s  -ELBO {row['negative_elbo']:.2f}"
            f"  NLL {row['nll']:.2f}  KL {row['kl']:.2f} nats"
        )
        self.bar.update(self.task, completed=step, text=text)

    def report(self, step: int, epoch: float, row: dict[str, float], images_per_s: float) -> None:
        """Show an evaluation on the test set; the pace is that since the first one, as kernels are compiled before."""
        now = time.monotonic()
        last = step == self.num_steps
        began, first = self.paced = self.paced or (now, step)
        if not last and (self.console.is_terminal or now - self.printed < LINE_SECONDS):
            return
        self.printed = now
        eta = (now - began) / max(1, step - first) * (self.num_steps - step)
        self.console.print(
            f"epoch {epoch:g}  step {step}/{self.num_steps}  test -ELBO {row['negative_elbo']:.2f}"
            f"  NLL {row['nll']:.2f}  KL {row['kl']:.2f} nats  {images_per_s:,.0f} images/s"
            + ("" if last or step == first else f"  ETA {int(eta // 60)}:{int(eta % 60):02d}")
        )

    def say(self, text: str) -> None:
        """One line for the reader."""
        self.console.print(text)
