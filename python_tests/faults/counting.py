"""How many faults: FLOE_FAULTS kills in all, 0 for the few of an ordinary test run."""

import os
from collections import Counter

ASKED = int(os.environ.get("FLOE_FAULTS", "0"))
KILLS = ASKED or 5
SURVIVED = Counter()
