"""Where the kernels are chosen, and the line that says what was found to hold."""

import sys
from pathlib import Path

from lengths import HELD

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))  # backends


def pytest_terminal_summary(terminalreporter):
    failed = len(terminalreporter.stats.get("failed", []))
    each = ", ".join(f"{count:,} {name}" for name, count in sorted(HELD.items()))
    if HELD:
        lost = "nothing lost" if not failed else f"{failed} tests failed"
        terminalreporter.write_line(f"numbers: {each}, {lost}")
