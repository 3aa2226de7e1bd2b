"""Measurements: `python -m hga_jax.bench decode|prefill|fetch|moe|load ... --json OUT`."""
