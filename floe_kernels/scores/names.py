"""Which block of a model a module belongs to, told from its name."""

import re

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


def in_block(name: str) -> bool:
    """Tell whether a module belongs to a numbered block.

    Args:
        name: Dotted module name.

    Example:
        >>> in_block("model.layers.3.mlp"), in_block("lm_head")
        (True, False)
    """
    return _BLOCK.match(name) is not None
