"""``python -m floe_kernels``: the command line."""

from floe_kernels.cli import main

main()
