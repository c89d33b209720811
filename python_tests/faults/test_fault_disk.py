"""A disk that is full or read-only, and caches that cannot be written."""

import contextlib
import os
import subprocess
import sys

import pytest
from counting import ASKED, KILLS, SURVIVED
from running import assert_same, assert_whole, finished, sentence, start


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes; needs the right to mount."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_full_disk_is_said_and_loses_nothing(arguments, undisturbed, tmp_path):
    used = sum(p.stat().st_size for p in undisturbed.rglob("*") if p.is_file())
    shares = (
        (0.6,) if not ASKED else (0.3, 0.8) if KILLS < 50 else [0.05 + 0.06 * i for i in range(20)]
    )
    for i, share in enumerate(shares):
        mount = tmp_path / f"disk{i}"
        with small_disk(mount, int(used * share) // 4096 * 4096):
            folder = mount / "run"
            code, said = finished(start(folder, arguments))
            if code:
                assert "pace left" in sentence(said)
                if folder.exists():
                    assert_whole(folder)
                SURVIVED["disk full"] += 1
            remount(mount, "size=64m")
            code, said = finished(start(folder, arguments))
            assert code == 0 or "holds a run" not in said, said
            assert_same(folder, undisturbed)


def test_a_read_only_folder_is_said(arguments, tmp_path):
    mount = tmp_path / "disk"
    with small_disk(mount, 2**20):
        remount(mount, "ro")
        code, said = finished(start(mount / "run", arguments))
        assert code == 1
        assert "Read-only file system" in sentence(said)
        SURVIVED["read-only folder"] += 1


@pytest.mark.skipif(not ASKED, reason="a cold process: make faults runs it")
def test_caches_that_cannot_be_written(arguments, tmp_path):
    # torch itself cannot be imported with TORCHINDUCTOR_CACHE_DIR in a place that cannot be made
    names = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    nowhere = dict.fromkeys(names, "/proc/no/such/place")
    done = subprocess.run(
        [sys.executable, "-m", "floe_kernels", "tune", *arguments, "--out", tmp_path / "run"],
        env={**os.environ, **nowhere, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    SURVIVED["unwritable caches"] += 1
