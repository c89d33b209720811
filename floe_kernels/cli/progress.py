"""Progress on a terminal, with bars; elsewhere as plain lines now and then."""

import contextlib
import time
from collections.abc import Iterator

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from floe_kernels.pipeline.progress import Bar, Progress

LINE_EVERY_S = 15.0


def console() -> Console:
    """Return a console that prints text as it is."""
    return Console(markup=False, highlight=False, soft_wrap=True)


class TerminalProgress(Progress):
    """Draws bars with figures, rate and remaining time, one below the other."""

    def __init__(self) -> None:
        self.console = console()
        self._bars: rich_progress.Progress | None = None
        self._open = 0

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, *, unit: str = "steps", done: int = 0) -> Iterator[Bar]:
        """Draw a bar until the block ends."""
        if not self.console.is_terminal:
            with _lines(self, title, total, unit, done) as bar:
                yield bar
            return
        if self._bars is None:
            self._bars = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}", markup=False),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                _Rate(),
                rich_progress.TextColumn("{task.fields[figures]}", markup=False),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("left"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(title, total=total, completed=done, figures="", unit=unit)
        try:
            yield _TerminalBar(self._bars, task)
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if not self._open:
                self._bars.stop()
                self._bars = None


class _TerminalBar(Bar):
    def __init__(self, bars: rich_progress.Progress, task: rich_progress.TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self.bars.update(self.task, advance=amount, figures=_words(figures))


class _Rate(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        """Show units a second, or seconds a unit where that is the larger number."""
        return Text(_rate(task.speed or 0.0, task.fields["unit"]))


class _LineBar(Bar):
    """Prints where things stand every now and then."""

    def __init__(self, owner: Progress, title: str, total: int, unit: str, done: int) -> None:
        self.owner, self.title, self.total, self.unit = owner, title, total, unit
        self.first = self.done = done
        self.start = self.last = time.monotonic()

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= LINE_EVERY_S and self.done < self.total:
            self.last = now
            rate = (self.done - self.first) / (now - self.start)
            left = (self.total - self.done) / rate if rate else 0.0
            parts = [f"{self.done}/{self.total} {self.unit}", _rate(rate, self.unit)]
            parts += [_words(figures)] * bool(figures) + [f"{left:.0f} s left"]
            self.owner.say(f"{self.title}: {', '.join(parts)}")


@contextlib.contextmanager
def _lines(owner: Progress, title: str, total: int, unit: str, done: int) -> Iterator[Bar]:
    bar = _LineBar(owner, title, total, unit, done)
    yield bar
    took = time.monotonic() - bar.start
    owner.say(f"{title}: {bar.done}/{total} {unit} in {took:.1f} s")


def _rate(speed: float, unit: str) -> str:
    if speed <= 0:
        return ""
    if speed >= 1:
        return f"{speed:.1f} {unit}/s"
    return f"{1 / speed:.2f} s/{unit.removesuffix('s')}"


def _words(figures: dict[str, float | str]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
