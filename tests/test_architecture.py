"""The walls of the code base, read from the sources: who may import whom, how long things get."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbconv import _build

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastbconv"
CSRC = ROOT / "csrc"

# What each module may import of ours. `*` is everything; a folder stands for all that is in it. A
# new module fails the test until it has a line here: the place to think about what it is.
ALLOWED = {
    "__init__": "*",
    "__main__": "_native train bench keras_weights",
    "_version": "",
    "_build": "",
    "_build_cuda": "",  # loaded by path, like _build itself
    "_build_sources": "",  # likewise
    "_builder": "_build",
    "_native": "_build _builder",
    "_arguments": "",
    "activations": "",
    "contexts": "kl",
    "_named": "",  # objects with a Keras name and a configuration
    "constraints": "_named",
    "_initial_values": "_named",  # initialisers that know no fans
    "initializers": "_initial_values _named",
    "regularizers": "",
    "kl": "_arguments activations",
    "_transforms": "estimators",  # the torch.func path of each operator
    "_fakes": "estimators",  # what each operator returns, uncomputed
    "ops": "_arguments _fakes _native _transforms activations",
    "_ranks": "",
    "_noise_mirror": "",
    "_seeds": "_arguments",
    "noise": "_arguments _noise_mirror _ranks _seeds ops",  # the native generator, by name only
    "selection": "_arguments _native estimators ops",
    "estimators": "",  # how noise enters the affine map
    "_library": "",  # the library's convolution
    "reference": "_library noise kl activations",
    "_composite": "_library activations estimators kl noise reference",
    "_call": "_arguments _composite activations kl noise ops reference selection",
    "_quick": "_arguments _native activations kl noise ops selection",
    "functional": "_arguments _call activations estimators functional kl noise reference",
    "layers": "_arguments _call _library _quick activations constraints contexts estimators"
    " functional initializers kl layers noise regularizers",
    "grouped": "_arguments _call contexts layers models noise",
    "models": "_arguments _surgery contexts functional kl layers noise",
    "optimizers": "_arguments models",
    "_surgery": "layers",  # a layer becomes its counterpart
    "convert": "_arguments _surgery estimators kl layers",
    "deterministic": "_surgery activations layers",
    "summary": "_surgery layers models noise",
    "prune": "_surgery kl layers",
    "weight_samples": "_arguments contexts models",
    "likelihoods": "",  # what the output of a model means
    "_passes": "_arguments contexts layers likelihoods models weight_samples",
    "prediction": "_arguments _passes likelihoods models",
    "keras_weights": "keras_weights models",  # h5py and tensorflow inside functions only
    "testing": "reference noise kl activations",
    "train": "__init__ _version train functional kl layers models noise",
    # _native: the probe of the processor, which is no operator
    "bench": "__init__ _native _version bench estimators functional layers noise testing",
}

# (folder, what it may include): the three tiers of csrc/README.md.
INCLUDES = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}
FRAMEWORK = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|Python\.h)\b")
CUDA_HEADER = re.compile(r"^(cuda|cub|cooperative_groups|mma|curand|cublas|cudnn|nv|cutlass)")
GENERATED = {_build.STAMP_HEADER}
INTERPRETER = "simt.h"  # tests/simt: stands in for CUDA where another compiler reads gpu.cuh


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def native_files(*suffixes: str) -> list[Path]:
    found = (path for path in CSRC.rglob("*") if path.is_file())
    return sorted(path for path in found if not suffixes or path.suffix in suffixes)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_key(dotted: str) -> str:
    """``layers.conv`` -> ``layers``: the row of the table a module belongs to."""
    return dotted.split(".", 1)[0] or "__init__"


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file, as rows of the table."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    package = ("fastbconv", *inside[:-1])
    names = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for p in modules()}
    names |= ALLOWED.keys()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{prefix}.{alias.name}" for alias in node.names]
        for target in targets:
            if target.split(".")[0] != "fastbconv":
                continue
            dotted = target.split(".")[1:]
            # The longest prefix that is a module; the rest is a name inside it.
            while (
                dotted
                and ".".join(dotted) not in names
                and ".".join(dotted) + ".__init__" not in names
            ):
                dotted.pop()
            found.add(module_key(".".join(dotted)))
    return found


@pytest.mark.parametrize("path", modules(), ids=short)
def test_python_import_rules(path: Path) -> None:
    key = module_key(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    assert key in ALLOWED, f"{key}: add it to ALLOWED, with what it may import"
    allowed = set(ALLOWED[key].split())
    if allowed != {"*"}:
        unexpected = own_imports(path) - allowed
        assert not unexpected, (
            f"{short(path)} imports {sorted(unexpected)}, may import {sorted(allowed)}"
        )


def test_build_description_needs_the_standard_library_only() -> None:
    for name in ("_build", "_build_cuda", "_build_sources", "_version"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                for imported in names:
                    assert imported.split(".")[0] in sys.stdlib_module_names, f"{name}: {imported}"


@pytest.mark.parametrize("path", [p for p in modules() if p.parts[-1] != "ops.py"], ids=short)
def test_only_ops_touches_the_registered_operators(path: Path) -> None:
    assert not re.search(r"torch\.ops\.fastbconv|ops\.load_library", path.read_text())


@pytest.mark.parametrize("path", modules(), ids=short)
def test_environment_is_read_in_one_place(path: Path) -> None:
    if path.name != "_build.py":
        assert not re.search(r"(environ|getenv)[^\n]*FASTBCONV_", path.read_text())


def includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", native_files(), ids=short)
def test_native_include_rules(path: Path) -> None:
    tier = path.relative_to(CSRC).parts[0]
    if path.suffix not in _build.native_sources.SUFFIXES:
        assert path.suffix == ".md", f"{short(path)}: files with this suffix are not shipped"
        return
    for bracket, name in includes(path):
        where = f"{short(path)} includes {name}"
        assert name != "torch/extension.h", f"{where}: half a minute per file; include what is used"
        if name in GENERATED:
            assert path.name == "module.cpp", f"{where}: every edit would recompile it"
        elif name == INTERPRETER:
            assert path.name == "gpu.cuh", f"{where}: kernels know gpu.cuh alone"
        elif bracket == '"':
            target = next((t for t in (path.parent / name, CSRC / name) if t.exists()), None)
            assert target is not None, f"{where}: no such file"
            target_tier = target.resolve().relative_to(CSRC).parts[0]
            assert target_tier in INCLUDES[tier], f"{where}: {tier} may include {INCLUDES[tier]}"
            if name.endswith(".inc"):
                allowed = path.name.startswith("isa_") or path.suffix == ".inc"
                assert allowed, f"{where}: algorithm files belong to isa_* files"
        elif FRAMEWORK.match(name):
            assert tier == "bindings", f"{where}: only csrc/bindings knows a framework"
        elif CUDA_HEADER.match(name):
            guarded = tier == "core" and "__CUDACC__" in path.read_text()
            assert (
                tier == "cuda"
                or guarded
                or (name.startswith("cuda_runtime") and tier == "bindings")
            ), where
        elif tier != "bindings":
            assert "/" not in name or name.startswith("sys/"), f"{where}: not a standard header"


def test_native_base_names_are_unique_per_suffix() -> None:
    # torch's builder names objects by base name: two of the same name would overwrite each other.
    compiled = native_files(".cpp", ".cu")
    count = collections.Counter(path.name for path in compiled)
    assert [name for name, times in count.items() if times > 1] == []


@pytest.mark.parametrize("path", native_files(".h", ".cuh"), ids=short)
def test_headers_are_guarded(path: Path) -> None:
    assert path.read_text().count("#pragma once") == 1


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
@pytest.mark.parametrize(
    "path", [p for p in native_files(".h") if p.parent.name in ("core", "cpu", "cuda")], ids=short
)
def test_each_header_compiles_alone(path: Path, standard: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{path.relative_to(CSRC).as_posix()}"\n')
    compiler = _build.compiler_command().split()
    run = subprocess.run(
        [
            *compiler,
            f"-std={standard}",
            "-Wall",
            "-Wextra",
            "-fsyntax-only",
            f"-I{CSRC}",
            str(source),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr


def others() -> list[Path]:
    """Sources outside package and csrc: tests and benchmarks."""
    folders = (ROOT / "tests", ROOT / "benchmarks")
    found = (path for folder in folders for path in folder.rglob("*"))
    return sorted(path for path in found if path.suffix in {".py", ".cpp", ".h"})


def ceiling(path: Path) -> int:
    return 300 if path.suffix in (".h", ".cuh") else 400


@pytest.mark.parametrize(
    "path",
    [*modules(), *native_files(*_build.native_sources.SUFFIXES), *others()],
    ids=short,
)
def test_files_stay_under_their_ceiling(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= ceiling(path), (
        f"{short(path)}: {lines} lines, at most {ceiling(path)}: split it"
    )


def test_setup_stays_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("path", modules(), ids=short)
def test_python_functions_stay_under_sixty_lines(path: Path) -> None:
    """Without their docstring, which is as long as it has to be."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            start = (first.end_lineno if documented else node.lineno) or 0
            length = (node.end_lineno or 0) - start
            assert length <= 60, f"{short(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", native_files(".h", ".inc", ".cpp", ".cu", ".cuh"), ids=short)
def test_native_functions_stay_under_sixty_lines(path: Path) -> None:
    """The formatter closes a function of namespace scope with a brace in the first column."""
    start, opened = 0, False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line and not line[0].isspace() and line[0] not in "}#/":
            start, opened = number, "namespace" not in line and "=" not in line.split("(")[0]
        elif (
            line.startswith("}")
            and opened
            and "}  // namespace" not in line
            and line.strip() == "}"
        ):
            assert number - start <= 60, f"{short(path)}:{start}: {number - start} lines"


TRACKED_TEXT = sorted(
    path
    for pattern in (
        "*",
        "fastbconv/**/*",
        "csrc/**/*",
        "tests/**/*",
        "benchmarks/**/*",
        "docs/*",
        ".ci/*",
    )
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".md", ".toml", ".h", ".inc", ".cpp", ".cu", ".cuh", ".txt", ".json"}
    or path.name in {"Makefile", "run"}
)


def test_no_absolute_paths_and_no_unfinished_marks() -> None:
    machine = re.compile(r"(?<![\w.])/(work|farm|root|home|Users|tmp)/\w")
    unfinished = re.compile(
        r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|mark\.(skip|x" + r"fail)|pytest\.skip"
    )
    # What a machine cannot do is no mark of unfinished work: where it is tried out, and there only.
    tries = {ROOT / "tests" / "torchrun.py": "pytest." + 'skip(f"two processes do not meet'}
    for path in filter(Path.is_file, TRACKED_TEXT):
        text = path.read_text().replace(tries.get(path, "\0"), "")
        for pattern in (machine, unfinished):
            found = pattern.search(text)
            if path != Path(__file__):
                assert found is None, f"{short(path)}: {found and found[0]}"
