"""The CPU kernels' steps, built with sanitizers into programs of their own, and run.

    python python_tests/cpu/sanitized.py          every instruction set; make sanitize

One line a program. Exits 1 if one found anything. AMX's tiles are emulated, csrc/cpu/tests has by
what: the kernels' source is the same, and the vectors around the tiles are the machine's own.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc/cpu"
STEPS = ("moe_lora", "grad_square")
EMULATED = ("amx", "amx_moe_lora")
SANITIZERS = {
    "AddressSanitizer, UBSan": "address,undefined",
    "ThreadSanitizer": "thread",
}
ISAS = ("default", "avx2", "avx512", "avx512_bf16", "amx")


def compiler() -> list[str] | None:
    """Return the C++ compiler's command, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def build(steps: str, sanitizer: str, folder: Path) -> Path:
    """Compile one program and return its path."""
    program = folder / f"{steps}-{sanitizer.replace(',', '-')}"
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", "-fno-omit-frame-pointer"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    if steps in EMULATED:
        sources = [CPU / f"tests/{steps}_test.cpp"]
    else:
        sources = [CPU / f"tests/{steps}_steps_test.cpp", CPU / "tests/amx_isa.cpp"]
        sources += [CPU / f"{steps}_{isa}.cpp" for isa in ISAS]
        flags += ["-include", "cpu/tests/amx_emulation.h"]
    command = [*(compiler() or ["c++"]), *flags, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program.name} does not compile:\n{done.stderr}")
    return program


def run(program: Path) -> tuple[int, str]:
    """Return how a program ended, and what it said."""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    worst = programs = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, sanitizer in SANITIZERS.items():
            for steps in (*STEPS, *EMULATED):
                code, said = run(build(steps, sanitizer, Path(folder)))
                ran = [line.partition(":")[0] for line in said.splitlines() if "failures" in line]
                found = "nothing found" if code == 0 else f"FOUND SOMETHING\n{said}"
                print(f"{name}, csrc/cpu {steps} steps ({', '.join(ran)}): {found}", flush=True)
                programs, worst = programs + 1, worst or code
    outcome = "something found, see above" if worst else "nothing found"
    print(f"sanitize: {programs} programs under {' and '.join(SANITIZERS)}: {outcome}")
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
