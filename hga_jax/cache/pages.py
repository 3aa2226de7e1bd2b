"""What histories of every tier have in common: an array of pages, by kv head and page id."""

from __future__ import annotations

from jaxtyping import Array, Float


def page_count(capacity: int, group_size: int) -> int:
    """Pages that hold `capacity` tokens."""
    return -(-capacity // group_size)


class Paged:
    """Sizes, read off the shape of `pages`."""

    pages: Float[Array, "K P part g H"]

    @property
    def kv_heads(self) -> int:
        return self.pages.shape[0]

    @property
    def head_dim(self) -> int:
        return self.pages.shape[4]

    @property
    def group_size(self) -> int:
        return self.pages.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.pages.shape[1] * self.pages.shape[3]
