"""Measurements: `python -m hga_jax.bench decode|decode_routing|prefill|routing|fetch|moe|load ... --json OUT`."""
