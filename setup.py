"""Build lowrank_ops._C with CMake; every flag and source is in CMakeLists.txt."""

import gzip
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
HERE = os.uname().machine
# The processor to build for; another one than this needs its cross compiler.
MACHINE = os.environ.get("LOWRANK_OPS_MACHINE", HERE)
if MACHINE != HERE:
    os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{MACHINE}"  # setuptools names the wheel for it


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
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # the last build's was in a folder that pip has removed
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DPYBIND11_INCLUDE={pybind11_headers()}",
            f"-DLOWRANK_OPS_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX').replace(HERE, MACHINE)}",
            f"-DLOWRANK_OPS_VERSION={self.distribution.get_version()}",
            f"-DLOWRANK_OPS_BUILD={os.environ.get('LOWRANK_OPS_BUILD', 'auto')}",
            f"-DLOWRANK_OPS_ISA_ONLY={os.environ.get('LOWRANK_OPS_ISA_ONLY', '')}",
        ]
        if MACHINE != HERE:
            configure.append(f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'csrc/cpu' / f'{MACHINE}-linux.cmake'}")
        # Python for macOS asks for its architectures this way.
        if architectures := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", "")):
            configure.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(architectures)}")
        work.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(work), "--parallel", str(os.cpu_count() or 1)])


class SameArchive(sdist):
    """The same sources give the same bytes: names in order, one time, and nobody's name."""

    def make_archive(self, base_name: str, format: str, root_dir: Any = None, base_dir: Any = None, **_: Any) -> str:
        assert format == "gztar" and root_dir is None
        time = int(os.environ.get("SOURCE_DATE_EPOCH", 315532800))  # 1980, the first year that archives know

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime, entry.mode = time, 0o755 if entry.mode & 0o100 else 0o644
            return entry

        Path(base_name).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=time) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for path in sorted(Path(base_dir).rglob("*")):
                archive.add(path, filter=plain, recursive=False)
        return f"{base_name}.tar.gz"


setup(ext_modules=[Extension("lowrank_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "sdist": SameArchive})
