"""What long work tells whoever watches; the command line draws it, and silence is the default."""

from contextlib import AbstractContextManager, nullcontext


class Bar:
    """One stretch of work of known length."""

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        """Report that ``amount`` more units are done, and figures worth a look."""


class Progress:
    """Receives the story of a run; this one keeps it to itself.

    Example:
        >>> with Progress().bar("training", total=3, unit="steps") as bar:
        ...     bar.advance(loss=2.5)
    """

    def say(self, text: str) -> None:
        """Report one line."""

    def bar(
        self, title: str, total: int, *, unit: str = "steps", done: int = 0
    ) -> AbstractContextManager[Bar]:
        """Open a stretch of work.

        Args:
            title: What is being done.
            total: Units in all.
            unit: Their name, in the plural.
            done: Units that an earlier run did.
        """
        return nullcontext(Bar())


SILENT = Progress()
