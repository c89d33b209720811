"""What a run came to, as rows of a table."""

from typing import Any, NamedTuple

HEADINGS = (
    "", "held-out loss", "gain kept", "trainable parameters", "s a step", "peak MiB",
)  # fmt: skip


class Row(NamedTuple):
    """One configuration; None is what was not measured, or means nothing there."""

    title: str
    loss: float  #: held out, nats a token
    gain: float | None  #: (base - this) / (base - all layers)
    parameters: int  #: trainable
    seconds: float | None  #: median of a training step
    peak: int | None  #: bytes

    def texts(self) -> tuple[str, ...]:
        """Return the row as people read it, in the order of ``HEADINGS``."""
        return (
            self.title,
            f"{self.loss:.4f}",
            "-" if self.gain is None else f"{self.gain:.1%}",
            f"{self.parameters:,}",
            "-" if self.seconds is None else f"{self.seconds:.2f}",
            "-" if self.peak is None else f"{self.peak / 2**20:,.0f}",
        )


def results(state: dict[str, Any]) -> list[Row]:
    """Read the rows off a run's state: the base first, then what was trained, in that order.

    Args:
        state: ``Run.state``.

    Returns:
        As many rows as there are; none before the base was evaluated.

    Example:
        >>> trained = {"all": {"title": "all", "loss": 2.0, "parameters": 10}}
        >>> [row.gain for row in results({"base": {"loss": 3.0}, "trained": trained})]
        [None, 1.0]
    """
    if "base" not in state:
        return []
    base, trained = state["base"]["loss"], state.get("trained", {})
    whole = trained["all"]["loss"] if "all" in trained else None
    rows = [Row("base model", base, None, 0, None, None)]
    for found in trained.values():
        gain = None
        if whole is not None and whole < base:
            gain = (base - found["loss"]) / (base - whole)
        rows.append(
            Row(
                found["title"],
                found["loss"],
                gain,
                found["parameters"],
                found.get("seconds_per_step"),
                found.get("peak_bytes"),
            )
        )
    return rows


def remarks(state: dict[str, Any]) -> list[str]:
    """Return what a reader of the table must know.

    Args:
        state: ``Run.state``.
    """
    lines = []
    base, trained = state.get("base", {}), state.get("trained", {})
    if base:
        lines.append(
            f"Held-out loss is in nats a token, over {base['tokens']:,} tokens, "
            "all weighing the same."
        )
        if base.get("note"):
            lines.append(f"Mind that {base['note']}.")
    if "all" in trained:
        lines.append(
            "Gain kept is the loss saved, as a part of what all layers save. "
            "One seed, one draw: it shows that things work, not which method is best."
        )
    if "all" in trained and base and trained["all"]["loss"] >= base["loss"]:
        lines.append("Training all layers did not lower the loss, so there is no gain to keep.")
    if len(steps := {found.get("steps") for found in trained.values()}) > 1:
        each = ", ".join(f"{found['title']}: {found['steps']}" for found in trained.values())
        lines.append(f"The trainings ended early and differ in steps ({each}), so do not compare.")
    elif any(found["steps"] < found.get("planned", 0) for found in trained.values()):
        planned = max(found["planned"] for found in trained.values())
        lines.append(f"The time was up after {min(steps)} of {planned} steps, the same for all.")
    methods = {found.get("peak_method") for found in trained.values()} - {None}
    lines += [f"Peak memory is {method}." for method in sorted(methods)]
    return lines
