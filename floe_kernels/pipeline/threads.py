"""Fewer threads where others keep the machine busy."""

import torch

from floe_kernels.pipeline.encoding import draw
from floe_kernels.pipeline.evaluation import evaluate
from floe_kernels.pipeline.machine import describe_machine, fastest_threads
from floe_kernels.pipeline.workbench import Workbench

PROBED = 4  # samples of a forward pass that measures threads


def choose_threads(bench: Workbench) -> None:
    """On a CPU that others keep busy, work with one thread; stay with what was chosen first.

    Args:
        bench: The model and its run; ``--threads`` is kept to.
    """
    if bench.loaded.device.type == "cuda" or bench.options.threads or not len(bench.dataset.train):
        return
    if "threads" not in bench.run.state:
        few = draw(bench.dataset.train, PROBED, bench.options.seed, "threads")
        chosen = fastest_threads(
            lambda: evaluate(bench.model, few, batch_size=PROBED, pad=bench.dataset.pad)
        )
        bench.run.finish("threads", {"chosen": chosen})
    chosen, most = bench.run.state["threads"]["chosen"], torch.get_num_threads()
    if chosen != most:
        bench.progress.say(f"others keep this machine busy: 1 thread is faster than {most}")
        torch.set_num_threads(chosen)
        bench.run.finish("machine", describe_machine(bench.loaded.device))
