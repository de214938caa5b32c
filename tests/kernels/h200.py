"""An H200 that is not there: programs compile to its machine code, and say what they take."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# figures of NVIDIA's data sheet and of cudaGetDeviceProperties
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 patch: 0 } runtime_version { major: 13 minor: 0 patch: 0 }
"""
DUMPS = Path(tempfile.mkdtemp(prefix="mosaic-gpu-"))
os.environ.update(MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(DUMPS))


class Kernel(NamedTuple):
    """What the assembler says of a kernel."""

    name: str
    registers: int
    spilled: int  # bytes
    wgmma: int  # instructions
    tma: int
    waits: int  # for products but the last ones: what the interpreter does not miss
    serialized: bool  # products of the tensor cores that wait for each other


def mesh(devices: int = 1, axes: AxisType = AxisType.Auto) -> Mesh:
    """So many H200s in a row, as mesh axis "d"."""
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=TARGET, topology=f"1x1x{devices}"
    )
    return Mesh(np.array(topology.devices), ("d",), axis_types=(axes,))


def argument(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    """An array that lies there, sharded as `spec` says."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compiled(f: Callable[..., Any], *args: Any) -> tuple[Any, list[Kernel]]:
    """The program, and its kernels as far as they were compiled here for the first time."""
    for old in DUMPS.iterdir():
        old.unlink()
    program = jax.jit(f).trace(*args).lower().compile()
    return program, [_read(path) for path in sorted(DUMPS.glob("*.ptx"))]


def shared_memory() -> list[int]:
    """Bytes of shared memory that the kernels lowered last want (JAX refuses too many)."""
    wanted = (path.read_text() for path in DUMPS.glob("*.resources.txt"))
    return [int(n) for text in wanted for n in re.findall(r"smem_scratch_bytes=(\d+)", text)]


def _read(path: Path) -> Kernel:
    ptx, said = path.read_text(), path.with_suffix(".ptxas").read_text()
    return Kernel(
        path.stem,
        int(re.findall(r"Used (\d+) registers", said)[-1]),
        sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|cumulative)", said)),
        len(re.findall(r"wgmma\.mma_async", ptx)),
        len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        len(re.findall(r"wgmma\.wait_group\.sync\.aligned [1-9]", ptx)),
        "C7510" in said,
    )
