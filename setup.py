"""Ahead-of-time build; everything that decides what is built stands in fastbconv/_build.py."""

import importlib.util
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def load(name):
    """Loads one file of the package by path, so that the package itself is not imported."""
    spec = importlib.util.spec_from_file_location(name, HERE / "fastbconv" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def native():
    """The extension, where torch can be imported (--no-build-isolation) and FASTBCONV_AOT is not 0.

    Otherwise nothing: the wheel carries the sources and compiles them at first use.
    """
    build = load("_build")
    if not build.settings().ahead_of_time or importlib.util.find_spec("torch") is None:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    spec = build.build_spec(HERE / "csrc", ahead_of_time=True)
    extension = spec.extension(HERE / "build" / "stamp", HERE)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    version=load("_version").__version__,
    packages=[*find_packages(include=["fastbconv", "fastbconv.*"]), "fastbconv._csrc"],
    package_dir={"fastbconv": "fastbconv", "fastbconv._csrc": "csrc"},
    package_data={
        "fastbconv": ["py.typed"],
        "fastbconv._csrc": [f"**/*.{suffix}" for suffix in ("h", "inc", "cpp", "cu", "cuh")],
    },
    include_package_data=False,
    **native(),
)
