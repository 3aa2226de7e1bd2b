"""hga_attention inside shard_map, over the batch and over kv heads, on four (fake) devices."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_shards_give_what_one_device_gives():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "sharded_attention.py")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 4
