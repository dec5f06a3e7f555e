"""Build lowrank_ops._C with CMake; every flag and source is in CMakeLists.txt."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def pybind11_headers() -> str:
    """pybind11's headers: from its own package, or torch's copy if a build in place has nothing else."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        import torch

        return str(Path(torch.__file__).parent / "include")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            "-S",
            str(Path(__file__).parent.resolve()),
            "-B",
            str(work),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYBIND11_INCLUDE={pybind11_headers()}",
            f"-DLOWRANK_OPS_VERSION={self.distribution.get_version()}",
            f"-DLOWRANK_OPS_BUILD={os.environ.get('LOWRANK_OPS_BUILD', 'auto')}",
        ]
        # Python for macOS asks for its architectures this way.
        if architectures := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", "")):
            configure.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(architectures)}")
        work.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(work), "--parallel", str(os.cpu_count() or 1)])


setup(ext_modules=[Extension("lowrank_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
