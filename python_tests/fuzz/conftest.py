"""How many cases are drawn: FLOE_FUZZ_CASES in all, 0 for the few of an ordinary test run."""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

ASKED = int(os.environ.get("FLOE_FUZZ_CASES", "0"))
QUICK = 500
TRIED = Counter()


def drawn(share):
    """Draw this share of all cases; a quick run draws the same ones every time."""
    return settings(
        max_examples=max(4, round(share * (ASKED or QUICK))),
        derandomize=not ASKED,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


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
