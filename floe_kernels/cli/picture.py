"""A plan, drawn on the terminal."""

from rich.console import Console

from floe_kernels.allocation import Plan
from floe_kernels.cli.tables import print_table
from floe_kernels.pipeline.picture import bar, picture


def print_plan(console: Console, plan: Plan) -> None:
    """Draw the model: a line for every layer, with the experts of each linear and their mean.

    Args:
        console: Where.
        plan: Any plan.
    """
    drawn = picture(plan)
    means = drawn.means()
    top = max(means, default=0.0)
    rows = []
    for i, layer in enumerate(drawn.layers):
        counts = ["" if n is None else str(n) if n else "·" for n in drawn.experts[i]]
        ranks = ",".join(map(str, drawn.ranks[i]))
        rows.append((layer, *counts, ranks, bar(means[i], top)))
    kinds = [kind.removesuffix("_proj") for kind in drawn.kinds]
    print_table(console, ("layer", *kinds, "rank", "experts, mean"), rows, bars=True)
    console.print(summary(plan))


def summary(plan: Plan) -> str:
    """Say in a line what a plan comes to.

    Args:
        plan: Any plan.
    """
    drawn = picture(plan)
    total = sum(p.experts for p in plan.placements.values())
    adapted = sum(bool(p.experts) for p in plan.placements.values())
    a_layer = sum(drawn.means())
    of = f" for {plan.base_model}" if plan.base_model else ""
    counted = f", {a_layer:g} with a layer's counted once" if a_layer == int(a_layer) else ""
    return (
        f"{plan.method}{of}: {total:,} experts{counted}, in {adapted} of {len(plan.modules)} "
        f"linears and {len(plan.layers())} of {len(drawn.layers)} layers, "
        f"{plan.parameters():,} trainable parameters."
    )
