"""Compile one layer's prefill and decode, kernels included, for an NVIDIA GPU that is not there: lowering, layouts, shared memory, ptxas.

    python tests/compile_without_gpu.py h100|a100|rtx5090 [--dtype float16] [--policy sketch paper sketch:votes=16 sketch:scan_pairs=16]

What interpret mode cannot catch, without device time. Needs the CUDA plugin (pip install -e '.[cuda]'; no driver, no GPU) and, where the
compiler does not find ptxas, XLA_FLAGS="--xla_gpu_cuda_data_dir=DIR --xla_gpu_enable_libnvptxcompiler=false" with DIR/bin/ptxas and
DIR/nvvm. Prints one line a program; the exit code counts those that failed. Shape: Qwen3-30B-A3B-FP8, 65,536 tokens.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.triton import gpu_info  # no public way to say for which GPU a kernel is lowered
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels.dispatch
import pallas_kernels.fp8

# compute capability, bytes of shared memory that one block may have, Pallas' name for the nearest GPU it knows
TARGETS = {
    "h100": ("major: 9 feature_extension: ACCELERATED_FEATURES", 232448, "H100"),
    "a100": ("major: 8", 166912, "A100"),
    "rtx5090": ("major: 12", 101376, "RTX_PRO_6000"),
}
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: {shared} cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }} device_description_str: "{name}"
"""
TOKENS = 65536


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--policy", nargs="+", default=["sketch", "paper"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args()
    capability, shared, known = TARGETS[options.target]
    info = gpu_info._get_gpu_info_impl(gpu_info.GpuVersion[known])
    gpu_info.get_gpu_info = lambda: info
    pallas_kernels.dispatch.on_cuda = lambda: True  # before hga_jax imports it
    pallas_kernels.fp8.conversion_for = lambda device=None: "bits" if options.target == "a100" else "cast"
    from hga_jax import programs
    from hga_jax.attention import HGAAttention
    from hga_jax.backend import Stats
    from hga_jax.config import ModelConfig, RopeConfig
    from hga_jax.eval.choices import parse_choices
    from hga_jax.model import Decoder
    from hga_jax.quantized import bounded_dtype

    description = DESCRIPTION.format(shared=shared, capability=capability, name=options.target)
    topology = topologies.get_topology_desc("1x1x1", platform="cuda", target_config=description, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    config = ModelConfig(
        model_type="qwen3_moe", vocab_size=4096, hidden_size=2048, layers=1, heads=32, kv_heads=4, head_dim=128, mlp_size=6144,
        native_context=262144, rope=RopeConfig(1e7), qk_norm=True, experts=128, experts_per_token=8, expert_size=768,
        fp8_block=(128, 128), fp8_skip=("lm_head",),
    )  # fmt: skip

    def there(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    layer = there(Decoder.abstract(config, options.dtype)).layers[0]
    number, stats = there(jax.ShapeDtypeStruct((), jnp.int32)), there(jax.eval_shape(Stats.zero))
    rows, row = (there(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in ((TOKENS, 2048), (2048,)))
    failed = 0
    for policy, hga in ((choice.name, choice.hga) for choice in parse_choices(options.policy)):
        backend = HGAAttention(hga, config.rope)
        kv_dtype = bounded_dtype(config, jnp.dtype(options.dtype))
        state = there(jax.eval_shape(lambda b=backend, d=kv_dtype: b.init_state(TOKENS + 256, 4, 128, d)))
        traced = {
            "prefill": programs.prefill_layer.trace(layer, rows, number, number, state, stats, backend=backend, segment=16384),
            "decode": programs._decode_layer.trace(layer, row, number, state, backend=backend),
        }
        for name, program in traced.items():
            begin = time.perf_counter()
            try:
                compiled = program.lower(lowering_platforms=("cuda",)).compile()
                memory = compiled.memory_analysis()
                said = f"ok, temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB" if memory else "ok"
            except Exception as error:  # each program is reported
                said, failed = f"FAILED: {type(error).__name__}: {str(error)[:500]}", failed + 1
            print(f"{options.target}: {name} of one layer, {policy}: {said}, {time.perf_counter() - begin:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
