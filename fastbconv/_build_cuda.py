"""What of CUDA a build uses: whether there is any, which nvcc, which architectures.

Like ``_build``, which loads it by path, this file needs the standard library alone; torch is
imported inside the functions. Nothing here starts CUDA if that can be helped: a process that has
started it must not fork, and pays for a context on every GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What a build without a GPU at hand is for; the last one also as PTX, for what comes later.
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
OLDEST = (8, 0)
_NAMED = {
    "Ampere": ("8.0", "8.6+PTX"),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
_NVML = "libnvidia-ml.so.1"
_USUAL_HOME = "/usr/local/cuda"  # where torch looks last


@dataclass(frozen=True)
class Toolkit:
    """The nvcc of a build, and what it compiles for."""

    nvcc: str
    release: str
    gencode: tuple[str, ...]

    def describe(self) -> str:
        """For people: release and architectures."""
        names = [flag.rsplit("=", 1)[1].replace("compute_", "PTX ") for flag in self.gencode]
        return f"nvcc {self.release} for {', '.join(names)}"


def support(root: Path, ahead_of_time: bool = False) -> tuple[Toolkit | None, str]:
    """What the CUDA kernels are built with, or None; and why (not)."""
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if not any(root.glob("cuda/*.cu")):
        return None, "this version has no CUDA kernels"
    nvcc = find_nvcc()
    if nvcc is None:
        return None, _missing_nvcc()
    release = _answer(nvcc, "--version", r"release (\d+\.\d+)")
    if not release:
        return None, f"{nvcc} --version does not name a release"
    if release[0].split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, (
            f"nvcc {release[0]} and torch's CUDA {torch.version.cuda} have different major versions"
        )
    known = [_version(number) for number in _answer(nvcc, "--list-gpu-arch", r"compute_(\d+)\b")]
    gencode, problem = architectures(known, ahead_of_time, release[0])
    if not gencode:
        return None, problem
    toolkit = Toolkit(nvcc, release[0], gencode)
    return toolkit, toolkit.describe()


def story(root: Path | None, built: bool, prebuilt: bool = True) -> str:
    """Why the library in use has CUDA kernels or has none.

    Args:
        root: the csrc folder, None where there is none.
        built: whether it has them.
        prebuilt: whether it was built ahead of time, else at a first use.
    """
    toolkit, reason = support(root or Path())
    if built == (toolkit is not None):
        return reason
    if built:
        return "built ahead of time" if prebuilt else f"compiled earlier; now {reason}"
    if prebuilt:
        return f"built ahead of time without CUDA; {reason} is here now: install fastbconv again"
    return (
        f"compiled without CUDA; {reason} is here now: start Python again: it will be compiled then"
    )


def _home() -> tuple[str, str]:
    """The variable that says where CUDA is, and its value; torch looks nowhere else then."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return name, os.environ[name]
    return "", ""


def find_nvcc() -> str | None:
    """The nvcc that torch's builder will call."""
    given = os.environ.get("PYTORCH_NVCC")
    if given:
        return shutil.which(given.split()[-1])
    _, home = _home()
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{_USUAL_HOME}/bin")


def _missing_nvcc() -> str:
    """Why :func:`find_nvcc` finds none."""
    if os.environ.get("PYTORCH_NVCC"):
        return f"PYTORCH_NVCC={os.environ['PYTORCH_NVCC']} names no program that is there"
    name, home = _home()
    if not name:
        return f"nvcc is neither on PATH nor in {_USUAL_HOME}/bin, and CUDA_HOME is not set"
    other = shutil.which("nvcc")
    advice = f" (there is one on PATH: {other}; unset {name} to use it)" if other else ""
    return f"{name}={home} has no bin/nvcc{advice}"


def architectures(
    known: list[tuple[int, int]], ahead_of_time: bool = False, release: str = ""
) -> tuple[tuple[str, ...], str]:
    """The -gencode flags, or none and the reason.

    ``TORCH_CUDA_ARCH_LIST`` decides where it is set, in torch's spelling ("9.0", "8.0;8.6+PTX",
    "Hopper"), and may name only what nvcc knows: a build that must fail is not begun. Else the GPUs
    of this machine do. Without any, a build ahead of time takes the default list, and a build at
    first use leaves CUDA out: it would be long, and for nobody. What is older than sm_80 has no
    kernels. For a GPU that nvcc does not know, PTX of an older one is built, which the driver
    compiles; of the default list it is left out.

    Args:
        known: architectures of this nvcc; empty: unknown, and all are taken.
        ahead_of_time: whether the build is for other machines too.
        release: of this nvcc, for the message.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    words = [word for word in re.split(r"[;\s]+", wanted) if word]
    if words and words != ["native"]:
        names = [name for word in words for name in _members(word, known)]
        problem = _not_built(names, known, release)
        if problem:
            return (), f"TORCH_CUDA_ARCH_LIST: {problem}"
        source = f"TORCH_CUDA_ARCH_LIST={wanted}"
    elif capabilities():
        names = [_nearest(found, known) for found in capabilities() if found >= OLDEST]
        source = "the GPU here"
    elif not ahead_of_time:
        return (), "there is no GPU here; TORCH_CUDA_ARCH_LIST=9.0, say, builds for one elsewhere"
    else:
        names = [n for n in DEFAULT_ARCHITECTURES if not known or _parsed(n)[0] in known]
        names = [*names[:-1], names[-1].removesuffix("+PTX") + "+PTX"] if names else []
        source = "nvcc"
    flags = [flag for name in names if name for flag in _flags(name)]
    if not flags:
        return (), f"{source} has no architecture of sm_80 or later that nvcc knows"
    return tuple(dict.fromkeys(flags)), ""


def _members(word: str, known: list[tuple[int, int]]) -> list[str]:
    """The architectures of a family that nvcc knows; what is no family, as it is."""
    family = _NAMED.get(word, ())
    return [name for name in family if not known or _parsed(name)[0] in known] or [word]


def _not_built(names: list[str], known: list[tuple[int, int]], release: str) -> str:
    """What is wrong with a list of architectures, or nothing."""
    for name in names:
        found = _ARCHITECTURE.fullmatch(name) and _parsed(name)[0]
        if not found or (known and found >= OLDEST and found not in known):
            usable = [
                f"{major}.{minor}" for major, minor in sorted(known) if (major, minor) >= OLDEST
            ]
            return (
                f"expected some of {', '.join(usable) or '8.0, 9.0 and so on'} (nvcc {release}), "
                "separated by ';' or spaces, with '+PTX' behind one for what comes later, "
                f'got "{name}"'
            )
    if all(_parsed(name)[0] < OLDEST for name in names):
        return f"{' '.join(names)} is too old: sm_{OLDEST[0]}{OLDEST[1]} or later"
    return ""


def _nearest(found: tuple[int, int], known: list[tuple[int, int]]) -> str:
    """What a GPU runs: its own architecture, or PTX of the newest that nvcc knows before it."""
    if found in known or not known:
        return f"{found[0]}.{found[1]}"
    older = max((version for version in known if OLDEST <= version < found), default=None)
    return "" if older is None else f"{older[0]}.{older[1]}+PTX"


def _parsed(name: str) -> tuple[tuple[int, int], str, bool]:
    found = _ARCHITECTURE.fullmatch(name)
    assert found is not None
    return (int(found[1]), int(found[2])), found[3], found[4] is not None


def _flags(name: str) -> list[str]:
    version, suffix, with_ptx = _parsed(name)
    if version < OLDEST:
        return []
    number = f"{version[0]}{version[1]}{suffix}"
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if with_ptx:
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _version(number: str) -> tuple[int, int]:
    return int(number[:-1]), int(number[-1])


@functools.lru_cache
def _answer(nvcc: str, option: str, pattern: str) -> list[str]:
    run = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    return re.findall(pattern, run.stdout)


@functools.lru_cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """(major, minor) of the GPUs of this machine, each once, in order.

    The driver's management library is asked, which starts nothing; where it is missing, torch.
    """
    try:
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:
            return _told_by_torch()
    except (OSError, AttributeError):
        return _told_by_torch()
    count = ctypes.c_uint()
    found = set()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            )
            found.add((major.value, minor.value))
    nvml.nvmlShutdown()
    return tuple(sorted(found))


def _told_by_torch() -> tuple[tuple[int, int], ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    return tuple(sorted({torch.cuda.get_device_capability(index) for index in range(count)}))
