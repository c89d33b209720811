"""A Llama of a few thousand weights and a tokenizer of its own, saved as a folder."""

import json
from pathlib import Path

import torch

LAYERS = 4
WORDS = [f"w{i}" for i in range(40)]


def make_model(folder: Path, *, layers: int = LAYERS, chat: bool = True) -> Path:
    """Write model and tokenizer; the same every time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", *WORDS, *"0123456789", "Add", "and", ".", "="]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
            "{% if add_generation_prompt %}assistant : {% endif %}"
        )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,  # the usual 0.02 leaves so small a model nothing to say
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 40) -> Path:
    """Write sums as records."""
    rows = [
        {
            "instruction": f"Add w{i % 40} and w{i * 7 % 40} .",
            "input": "",
            "output": f"w{i * 8 % 40}",
        }
        for i in range(count)
    ]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
