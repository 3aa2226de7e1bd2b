"""Conversations whose K/V history outlives the process: stored on disk after every turn, resumed with the same logits.

blocks of tokens found by content   hga_jax/cache/disk.py       what a session says about itself   manifest.py, identity.py
states taken apart and rebuilt      state_format.py             writing behind compute             recording.py
the longest stored beginning        reuse.py                    a conversation                     conversation.py
`python -m hga_jax.session list|show|verify|delete DIR`         __main__.py
"""

from hga_jax.cache.disk import StoreError
from hga_jax.session.conversation import Session

__all__ = ["Session", "StoreError"]
