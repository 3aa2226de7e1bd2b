"""Runs one measurement: each is a module of this package with `main(argv)`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import hga_jax.bench
from hga_jax.plan import allow_pinning_all


def main() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(hga_jax.bench.__path__) if not module.name.startswith("_"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"usage: python -m hga_jax.bench {{{','.join(names)}}} [options]", file=sys.stderr)
        sys.exit(2)
    allow_pinning_all()
    if sys.argv[1] == "load" and "--session" in sys.argv[2:]:
        importlib.import_module("hga_jax.bench.session").main(["resume", *(word for word in sys.argv[2:] if word != "--session")])
    elif "--whole-model" in sys.argv[2:]:
        importlib.import_module("hga_jax.bench._whole_model").main(sys.argv[1], sys.argv[2:])
    else:
        importlib.import_module(f"hga_jax.bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
