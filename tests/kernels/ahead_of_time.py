"""Compiles Triton kernels for a GPU that this machine need not have, and reads what the code takes."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (90, 80)
MAX_REGISTERS = 255
MAX_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True)
class Compiled:
    ptx: str
    registers: int
    """Of one thread."""
    spilled_bytes: int
    """Of one thread: its stack and local memory."""
    shared_bytes: int


def compile_for(
    architecture: int,
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    constants: dict[str, int | bool],
    *,
    num_warps: int,
    folder: Path,
) -> Compiled:
    """Compiles what a launch would.

    Args:
        pointers: types of the pointers, "*i64" and the like. All other arguments are annotated constants or
            integers, and none is specialised: only then is the signature the same whatever the values are.
        folder: for the machine code.
    """
    signature = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.name in pointers:
            assert parameter.do_not_specialize_on_alignment
            signature[parameter.name] = pointers[parameter.name]
        else:
            assert parameter.do_not_specialize
            assert parameter.annotation_type
            signature[parameter.name] = parameter.annotation_type
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {}),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps},
    )
    (binary := folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    taken = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return Compiled(
        ptx=compiled.asm["ptx"],
        registers=taken["REG"],
        spilled_bytes=taken["STACK"] + taken["LOCAL"],
        shared_bytes=taken["SHARED"] + compiled.metadata.shared,
    )
