"""What nvcc makes of csrc/cuda/*.cu: registers, stack and spills of each kernel, machine code.

``python tests/cuda_resources.py`` compiles everything and writes tests/data/cuda_resources.json
anew; the difference then shows in the review. A limit is the count rounded up to 8, the unit in
which registers are allocated. ``allowed`` in that file excuses stack and spills of a kernel, by
hand: ``{"stack": 8, "spills": 12, "reason": "..."}``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
TABLE = ROOT / "tests" / "data" / "cuda_resources.json"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
FLAGS = ["-std=c++17", "-O3", f"-I{CSRC}", "-Werror", "all-warnings"]


def find_nvcc() -> str | None:
    """The compiler that a build would take: the places of fastbconv/_build.py, in its order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return found or shutil.which("nvcc", path="/usr/local/cuda/bin")


def summary() -> str:
    """One line below the results of a test run."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "cuda: no nvcc, so the kernels are run on the interpreter and not compiled"
    return f"cuda: kernels are compiled by {nvcc} for {', '.join(ARCHITECTURES)}"


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int  # bytes of stores and loads


class Compiled(NamedTuple):
    """One source for all architectures."""

    status: int
    log: str
    kernels: list[Kernel]


def short_name(demangled: str) -> str:
    """``void fbc::cuda::wgrad_kernel<float, true>(Args)`` -> ``wgrad_kernel<float, true>``."""
    name = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\bfbc::|\bcuda::", "", name)
    depth = 0
    for i, letter in enumerate(name):  # the parameters begin at the first ( outside < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name.removeprefix("void ")).replace(
        "> >", ">>"
    )


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    assert tool, "cu++filt (CUDA) or c++filt (binutils) is needed to name kernels"
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def parse(log: str) -> list[Kernel]:
    """The kernels of an output of ``ptxas -v``."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    names = demangle([row[0] for row in found])
    return [
        Kernel(short_name(name), arch, int(registers), int(stack), int(stores) + int(loads))
        for name, (_, arch, stack, stores, loads, registers) in zip(names, found, strict=True)
    ]


def compile_source(nvcc: str, source: Path, folder: Path) -> Compiled:
    targets = [f"-gencode=arch={a},code={code}" for code, a in ARCHITECTURES.items()]
    command = [nvcc, *FLAGS, "--fmad=false", "-lineinfo", *targets, "-Xptxas=-v", "-fatbin"]
    command += ["-o", str(folder / f"{source.stem}.fatbin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    return Compiled(run.returncode, log, parse(log))


def compile_cubin(nvcc: str, source: Path, architecture: str, fmad: bool, folder: Path) -> Path:
    target = folder / f"{source.stem}_{architecture}_{fmad}.cubin"
    arch = f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}"
    command = [nvcc, *FLAGS, f"--fmad={str(fmad).lower()}", arch, "-cubin", "-o", str(target)]
    subprocess.run([*command, str(source)], check=True)
    return target


def machine_code(cubin: Path) -> dict[str, bytes]:
    """The .text.* sections of an ELF64 file: the instructions of each kernel and function."""
    data = cubin.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{cubin}: a little-endian ELF64 file is expected"
    (table,) = struct.unpack_from("<Q", data, 40)
    entry, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    sections = {}
    for name, kind, _, _, offset, size in headers:
        start = strings + name
        label = data[start : data.index(b"\0", start)].decode()
        if kind == 1 and label.startswith(".text."):
            sections[label.removeprefix(".text.")] = data[offset : offset + size]
    return sections


def limits(kernels: list[Kernel]) -> dict[str, dict[str, int]]:
    """Rows of the table: registers rounded up to the unit of their allocation."""
    rows: dict[str, dict[str, int]] = {}
    for kernel in sorted(kernels):
        rows.setdefault(kernel.name, {})[kernel.architecture] = (kernel.registers + 7) // 8 * 8
    return rows


def read_table() -> dict:
    return json.loads(TABLE.read_text())


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print(summary(), file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda s: compile_source(nvcc, s, Path(folder)), SOURCES))
    for source, result in zip(SOURCES, done, strict=True):
        if result.status != 0:
            print(f"{source.name}:\n{result.log[-4000:]}", file=sys.stderr)
            return 1
    kernels = [kernel for result in done for kernel in result.kernels]
    allowed = read_table()["allowed"] if TABLE.exists() else {}
    rows = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in limits(kernels).items()
    )
    excuses = json.dumps(allowed, indent=2).replace("\n", "\n  ")
    TABLE.write_text(f'{{\n  "allowed": {excuses},\n  "registers": {{\n{rows}\n  }}\n}}\n')
    for kernel in kernels:
        if kernel.stack or kernel.spills:
            print(
                f"{kernel.name} {kernel.architecture}: {kernel.stack} bytes of stack, "
                f"{kernel.spills} of spills"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
