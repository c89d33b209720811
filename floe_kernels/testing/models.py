"""Tiny language models with random weights, one for each architecture that has defaults."""

from typing import Any

import torch

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "gemma2": ("Gemma2Config", {**_GROUPED, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {**_SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "phi": ("PhiConfig", _SIZES),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Make a causal language model of 3 layers and 32 channels, in float32 and eval mode.

    Args:
        architecture: One of ``ARCHITECTURES``.
        seed: Of the weights; the global random state is left as it was.
        overrides: Fields of the architecture's config.

    Returns:
        A transformers ``PreTrainedModel``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: The architecture is unknown.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "tiny models need transformers: pip install floe-kernels[transformers]"
        ) from error
    config_name, sizes = _ARCHITECTURES[architecture]
    config = getattr(transformers, config_name)(**{**sizes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
