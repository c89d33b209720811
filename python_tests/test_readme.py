"""README's Python runs as written, on a model small enough for a test."""

import re
from pathlib import Path

import pytest
import torch

BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "README.md").read_text(), re.M | re.S
)


def test_there_is_something_to_run():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda name: transformers.LlamaForCausalLM(config),
    )
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(64, (2, 10))
    names = {"batches": [{"input_ids": ids, "labels": ids}]}
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), names)
    if "plan" in names:
        assert len(names["plan"].layers()) == 1
        assert (tmp_path / "adapter" / "adapter.json").exists()
