"""Measurements: `python -m hga_jax.bench decode|prefill|routing|fetch|moe|load ... --json OUT`."""
