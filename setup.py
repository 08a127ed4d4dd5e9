"""Builds the native modules where a compiler is found; without one minillm installs and runs in pure Python.

    minillm._cpu    csrc/cpu/*.cpp     C++17, pybind11, OpenMP; no torch headers, so one build serves every torch

A failed build is said and skipped. MINILLM_NATIVE=1 makes it an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent
CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))

cpu = Pybind11Extension(
    "minillm._cpu",
    CPU_SOURCES,
    cxx_std=17,
    depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.h")],
    # -Wno: the headers of the intrinsics read a variable before it is set, on purpose
    extra_compile_args=[
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-ffp-contract=off",  # a product and a sum are fused where the code says so, and nowhere else
        "-Wall",
        "-Wextra",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ],
    extra_link_args=["-fopenmp"],
    optional=os.environ.get("MINILLM_NATIVE") != "1",
)

ParallelCompile("MINILLM_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=[cpu] if CPU_SOURCES else [], cmdclass={"build_ext": build_ext})
