"""Whole runs: data in, a folder with plan, adapter, history and report out.

Measure, decide and apply on a real model, in steps that can be killed and resumed.
"""

from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.progress import Progress
from floe_kernels.pipeline.runs import Run, load_run, open_run

__all__ = ["Options", "Progress", "Run", "load_run", "open_run"]
