"""`python -m hga_jax.eval`: what a policy costs in loss, in attention mass, and in finding things, always beside dense attention.

nll      loss on your texts, the gap to dense with its standard error, by position and by document
sweep    the same over thresholds or budgets: the gap against the tokens fetched
mass     attention mass that a policy leaves unopened, per layer and head
needle   one fact asked for: length x depth grid
ruler    the RULER task families that need no outside data

Nothing here is needed to run a model; nothing outside imports it.
"""
