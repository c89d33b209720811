"""Counts the cases that were tried, over all processes, and says so at the end."""

import pytest
from drawing import TRIED


@pytest.fixture
def tried(request):
    """Count a case that ran to its end."""
    kernel = request.node.callspec.params.get("backend", "any") if _parametrized(request) else "any"

    def count():
        TRIED[kernel] += 1

    return count


def _parametrized(request):
    return hasattr(request.node, "callspec")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_terminal_summary(terminalreporter):
    failed = len(terminalreporter.stats.get("failed", []))
    each = ", ".join(f"{name} {count}" for name, count in sorted(TRIED.items()))
    if TRIED:
        terminalreporter.write_line(
            f"fuzz: {TRIED.total()} cases right ({each}), {failed} tests failed"
        )
