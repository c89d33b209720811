"""Model descriptions that the allocation tests share."""

from floe_kernels._types import ModuleSpec

LLAMA_2_7B = {  # in and out features of a block's linears
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}


def transformer(layers, linears=LLAMA_2_7B):
    return {
        f"model.layers.{i}.{name}": ModuleSpec(*sizes, f"model.layers.{i}")
        for i in range(layers)
        for name, sizes in linears.items()
    }


def small(layers):
    """Two linears a layer, of unlike cost."""
    return transformer(layers, {"q": (8, 8), "up": (8, 24)})


def layer_scores(values):
    return {f"model.layers.{i}": value for i, value in enumerate(values)}
