"""Fetches what trees of seeds are compiled against where another machine's torch is not installed.

    python tasks/seeds/toolkit.py FOLDER --torch 2.11.0 --python 3.12
    SEEDS_TORCH=FOLDER TORCH_CUDA_ARCH_LIST=9.0 assay prepare tasks/seeds/...

Headers come from the wheels of that torch and of the libraries of CUDA that it asks for; pip fetches them, and nothing
is installed. Libraries are linked by their names alone: FOLDER has empty ones, and the other machine has torch's.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "any")
_OF_CUDA = ("cublas", "cusolver", "cusparse")
_LIBRARIES = ("c10", "torch", "torch_cpu", "c10_cuda", "torch_cuda")


def fetched(wheel: str, python: str, folder: Path) -> zipfile.ZipFile:
    """A wheel for that Python, opened. CalledProcessError if there is none."""
    before = set(folder.iterdir())
    platforms = [option for platform in _PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder), wheel]
    subprocess.run(command, check=True)
    (file,) = set(folder.iterdir()) - before
    return zipfile.ZipFile(file)


def needs(wheel: zipfile.ZipFile) -> list[str]:
    """What a wheel asks for, as its metadata says it."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return [line.removeprefix("Requires-Dist: ") for line in wheel.read(name).decode().splitlines() if "Dist: " in line]


def made(to: Path, torch: str, python: str) -> None:
    """Fills the folder. ValueError if that torch names no version of CUDA's toolkit."""
    with tempfile.TemporaryDirectory() as downloads:
        wheel = fetched(f"torch=={torch}", python, Path(downloads))
        wheel.extractall(to, [name for name in wheel.namelist() if name.startswith("torch/include/")])
        asked = (re.match(r"cuda-toolkit\[.*\]==([\d.]+)", line) for line in needs(wheel))
        version = next((found[1] for found in asked if found), None)
        if version is None:
            raise ValueError(f"--torch: expected one that asks for cuda-toolkit, got {torch}")
        toolkit = needs(fetched(f"cuda-toolkit=={version}", python, Path(downloads)))
        for library in _OF_CUDA:
            line = next(line for line in toolkit if line.endswith(f"extra == '{library}'"))
            part = fetched(line.partition(";")[0].strip(), python, Path(downloads))
            for name in part.namelist():
                if "/include/" in name and not name.endswith("/"):
                    file = to / "include" / name.partition("/include/")[2]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(part.read(name))
    (to / "torch/lib").mkdir(exist_ok=True)
    for library in _LIBRARIES:
        name = f"lib{library}.so"
        command = [
            "g++",
            "-shared",
            "-o",
            str(to / "torch/lib" / name),
            f"-Wl,-soname,{name}",
            "-x",
            "c++",
            "/dev/null",
        ]
        subprocess.run(command, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, or made before with the same versions")
    parser.add_argument("--torch", required=True, metavar="VERSION", help="of the machine that measures")
    parser.add_argument("--python", required=True, metavar="VERSION", help="of the machine that measures, as 3.12")
    given = parser.parse_args(arguments)
    try:
        made(given.folder, given.torch, given.python)
    except (ValueError, subprocess.CalledProcessError) as problem:
        sys.stderr.write(f"toolkit: {problem}\n")
        return 2
    sys.stdout.write(f"SEEDS_TORCH={given.folder.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
