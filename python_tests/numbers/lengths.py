"""How long the runs are: FLOE_FAULTS asks for the long ones, 0 for those of an ordinary test."""

import os
from collections import Counter

LONG = int(os.environ.get("FLOE_FAULTS", "0")) > 0
HELD = Counter()
