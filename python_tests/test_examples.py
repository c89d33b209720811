"""Every example runs as it stands, in an empty folder, and stays short."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_loop": ["transformers", "safetensors"],
    "transformers_trainer": ["transformers", "accelerate"],
    "trl_sft": ["trl", "datasets"],
    "accelerate_loop": ["transformers", "accelerate"],
    "lightning_module": ["transformers", "lightning"],
    "peft_adapter": ["transformers", "peft"],
    "distributed": ["transformers", "safetensors"],
    "fully_sharded": ["transformers", "safetensors"],
}
LEAVES = {"peft_adapter": ["mixture", "averaged"]}
SAYS = {
    "plain_loop": "epoch 2: loss",
    "transformers_trainer": "router_entropy",
    "trl_sft": "[0.",
    "accelerate_loop": "router_entropy",
    "lightning_module": "router_entropy",
    "peft_adapter": "LlamaForCausalLM",
    "distributed": "8 samples",
    "fully_sharded": "32 samples",
}
TWO_PROCESSES = ("distributed", "fully_sharded")


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, tmp_path):
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    runner = [sys.executable]
    if name in TWO_PROCESSES:
        runner += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [*runner, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert SAYS[name] in result.stdout
    for left in LEAVES.get(name, ["adapter"]):
        assert any((tmp_path / left).glob("*.safetensors"))
