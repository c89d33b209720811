"""How many cases are drawn: FLOE_FUZZ_CASES in all, 0 for the few of an ordinary test run."""

import os
from collections import Counter

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
