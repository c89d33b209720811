"""Nothing here needs a network: not an import, not a step of training, not a test."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import floe_kernels

CHECKOUT = Path(floe_kernels.__file__).parents[1]

WITHOUT_NETWORK = """
import importlib, pkgutil, socket
def refuse(*args, **kwargs):
    raise RuntimeError(f"reached for the network: {args}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import floe_kernels as fk
absent = set()
for module in pkgutil.walk_packages(fk.__path__, "floe_kernels."):
    if not module.name.endswith(("._C", "._info", "__main__")):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            absent.add(error.name)
import torch
layer = fk.FusedMoELoRA(torch.nn.Linear(6, 4), ranks=[2, 3], top_k=1)
layer(torch.ones(5, 6)).sum().backward()
assert layer.lora_B.grad.isfinite().all()
print(sorted(absent))
"""


def test_imports_and_trains_without_a_network():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "floe_kernels" not in done.stdout


@pytest.mark.parametrize("host", ["192.0.2.1", b"192.0.2.1", "example.invalid"])  # RFC 5737, 6761
def test_a_test_cannot_leave_this_machine(host, stay_here):
    with pytest.raises(OSError, match="this machine only"):
        socket.getaddrinfo(host, 80)
    with socket.socket() as own, pytest.raises(OSError, match="this machine only"):
        own.connect((host, 80))
    assert stay_here == [host, host], "the fixture fails a test that swallows the error"
    stay_here.clear()


def test_a_test_can_talk_to_itself():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5),
    ):
        server.accept()[0].close()
    left, right = socket.socketpair()
    left.close(), right.close()
