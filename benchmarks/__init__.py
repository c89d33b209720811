"""Measures every operation beside the peers that can run, and says where each one is wrong."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, between our tables
