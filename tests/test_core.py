"""What a native program cannot say of itself: which instructions and symbols the compiler emitted.

The same inline functions are compiled once for each instruction set, into one library. If
one of them were emitted as a shared (weak) symbol, the linker would keep one copy for all, perhaps
one with instructions that an old processor lacks. So the AVX units may define nothing but their
tables, and AVX instructions may occur in functions of their namespaces alone.
"""

from __future__ import annotations

import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastbconv import _build, _native

CPU = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
ALL_TABLES = {"table_float", "table_double", "table_noise", "table_probes"}
TABLES = {"isa_avx2": ALL_TABLES, "isa_avx512": ALL_TABLES, "isa_avx512bf16": {"table_pairs"}}
AVX_UNITS = list(TABLES)
# Mnemonics of the VEX and EVEX encodings begin with v, as no others do; and their wide registers.
AVX = re.compile(r"\tv[a-z]|%[yz]mm")


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The units at -O1, where fewer functions are inlined away than in the library."""
    folder = tmp_path_factory.mktemp("objects")
    flags = [flag for flag in _build._CXX_FLAGS if not flag.startswith("-O")]

    def compile_unit(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        options = ["-std=c++17", "-O1", "-fopenmp-simd", "-c"]
        run(*_build.compiler_command().split(), *flags, *options, source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(compile_unit, sorted(CPU.glob("isa_*.cpp")))
        return {target.stem: target for target in compiled}


def functions(file: Path) -> dict[str, str]:
    """Disassembly by mangled name."""
    listing = run("objdump", "--disassemble", "--no-show-raw-insn", file)
    pieces = re.split(r"^[0-9a-f]+ <(.+)>:$", listing, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_baseline_has_no_avx_instructions(objects: dict[str, Path]) -> None:
    code = functions(objects["isa_baseline"])
    assert any("normals" in name for name in code)
    assert [name for name, body in code.items() if AVX.search(body)] == []


@pytest.mark.parametrize("unit", AVX_UNITS)
def test_avx_units_define_their_tables_and_nothing_else(
    unit: str, objects: dict[str, Path]
) -> None:
    symbols = [line.split() for line in run("nm", objects[unit]).splitlines()]
    shared = [(kind, name) for *_, kind, name in symbols if kind in "WwVvuiCBDGSR"]
    assert shared == []
    defined = {name for *_, kind, name in symbols if kind == "T"}
    expected = {f"_ZN3fbc{len(unit)}{unit}{len(table)}{table}Ev" for table in TABLES[unit]}
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    assert defined == (expected if on_x86 else set())


def test_library_uses_avx_in_the_avx_units_alone() -> None:
    library = _native.load().__file__
    code = functions(Path(library))
    avx = {name for name, body in code.items() if AVX.search(body)}
    strangers = {name for name in avx if not any(unit in name for unit in AVX_UNITS)}
    assert strangers == set()
    if platform.machine() in ("x86_64", "AMD64"):
        for unit in AVX_UNITS:  # the pattern finds what it looks for
            assert any(unit in name and "fprop" in name for name in avx)


def test_library_does_not_export_its_internals() -> None:
    """Two extensions in one process share exported C++ names; ours are not exported."""
    exported = run("nm", "--dynamic", "--defined-only", "--demangle", _native.load().__file__)
    assert [line for line in exported.splitlines() if "fbc::" in line] == []
