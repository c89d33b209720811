"""FLoE on Hugging Face models, and on any other module: find, apply, save, load, remove.

Nothing here imports transformers; its conventions are recognised where a model follows them.
"""

from floe_kernels.integrations.adapter import load_adapter, save_adapter
from floe_kernels.integrations.apply import adapted_modules, apply_plan, remove_adapters
from floe_kernels.integrations.fingerprint import fingerprint
from floe_kernels.integrations.targets import find_modules

__all__ = [
    "adapted_modules",
    "apply_plan",
    "find_modules",
    "fingerprint",
    "load_adapter",
    "remove_adapters",
    "save_adapter",
]
