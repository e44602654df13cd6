"""Runs the programs on torch's own allocator and writes down what it did: see the README beside."""

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from tests.estimator.allocator_recording.programs import Program, programs

_HERE = Path(__file__).parent
RECORDING = _HERE / "recording.json"
# Generated where torch is built for CUDA, and absent from the headers of other builds.
_MACROS = "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n"
_EXPORTS = "libcudart.so.13 { global: *; };\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", type=Path, help="folder with libc10.so and libc10_cuda.so of a CUDA build of this torch version")
    parser.add_argument("includes", type=Path, nargs="+", help="folders with cuda_runtime_api.h and crt/host_defines.h")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = _build(Path(folder), options.libraries.resolve(), options.includes)
        entries = [_entry(program, _run(driver, program)) for program in programs()]
    text = ",\n".join(json.dumps(entry) for entry in entries)
    RECORDING.write_text(f'{{"torch": "{torch.__version__.partition("+")[0]}", "programs": [\n{text}\n]}}\n', encoding="utf-8")


def _build(folder: Path, libraries: Path, includes: list[Path]) -> Path:
    (folder / "c10/cuda/impl").mkdir(parents=True)
    (folder / "c10/cuda/impl/cuda_cmake_macros.h").write_text(_MACROS)
    (folder / "exports.map").write_text(_EXPORTS)
    headers = [f"-I{path}" for path in (folder, Path(torch.__file__).parent / "include", *includes)]
    runtime, driver = folder / "libcudart.so.13", folder / "driver"
    shared = ["-shared", "-fPIC", f"-Wl,--version-script={folder}/exports.map", "-Wl,-soname,libcudart.so.13"]
    linked = [f"-L{libraries}", f"-L{folder}", "-lc10_cuda", "-lc10", "-l:libcudart.so.13", f"-Wl,-rpath,{libraries}:{folder}"]
    for arguments in (
        [*shared, *headers, str(_HERE / "cudart.cpp"), "-o", str(runtime)],
        [*headers, str(_HERE / "driver.cpp"), "-o", str(driver), *linked],
    ):
        subprocess.run(["g++", "-std=c++20", "-O1", *arguments], check=True)
    return driver


def _run(driver: Path, program: Program) -> list[str]:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(driver.parent),
        "PYTORCH_CUDA_ALLOC_CONF": program.options,
        "CAPACITY": str(program.capacity_bytes),
    }
    lines = "\n".join(program.lines) + "\n"
    done = subprocess.run([driver], input=lines, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def _entry(program: Program, output: list[str]) -> dict[str, object]:
    """What a test compares: every line in one digest, and some in clear to see where they part."""
    events = len(program.lines)
    return {
        "options": program.options,
        "capacity_bytes": program.capacity_bytes,
        "sha256": digest(output),
        "after": {str(at): output[at] for at in range(49, events, 50)},
        "num_segments": len(output) - events,
    }


def digest(output: list[str]) -> str:
    return hashlib.sha256("\n".join(output).encode()).hexdigest()


if __name__ == "__main__":
    main()
