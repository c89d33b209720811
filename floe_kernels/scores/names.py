"""Which block of a model a module belongs to, told from its name."""

import re

# PEFT's wrapper around a model, and its name for an adapter's share of a linear
_WRAPPED = re.compile(r"(?:base_model\.model\.)?(.*?)(?:\.floe_experts\.[^.]+)?")
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def layer_of(name: str) -> str:
    """Return the enclosing repeated block: the name up to its first number.

    A module outside any numbered block is its own layer.

    Args:
        name: Dotted module name, as ``named_modules`` gives it.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj")
        'model.layers.3'
        >>> layer_of("lm_head")
        'lm_head'
    """
    match = _BLOCK.match(name)
    return match.group() if match else name


def plain_name(name: str) -> str:
    """Return a module's name in the base model, without what PEFT's wrappers add to it.

    Args:
        name: Dotted module name, as ``named_modules`` gives it.

    Example:
        >>> plain_name("base_model.model.model.layers.3.q_proj.floe_experts.default")
        'model.layers.3.q_proj'
    """
    match = _WRAPPED.fullmatch(name)
    return match[1] if match else name


def in_block(name: str) -> bool:
    """Tell whether a module belongs to a numbered block.

    Args:
        name: Dotted module name.

    Example:
        >>> in_block("model.layers.3.mlp"), in_block("lm_head")
        (True, False)
    """
    return _BLOCK.match(name) is not None
