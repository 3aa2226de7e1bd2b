"""Tunables of the two decode kernels, and the measured choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from pallas_kernels.fp8_matvec.config import Config as Matvec


@dataclass(frozen=True)
class Config:
    """gate_up: one program computes `rows` values of one (token, expert) pair's hidden vector, from gate and up.
    down: one program computes `rows` outputs of one token, summed over its experts, all loaded at once.
    """

    gate_up: Matvec = field(default_factory=lambda: Matvec(rows=4, columns=2048, in_flight=1))
    down: Matvec = field(default_factory=lambda: Matvec(rows=4, columns=512, in_flight=2))

    def __post_init__(self) -> None:
        if self.gate_up.splits != 1 or self.down.splits != 1:
            raise ValueError("splits must be 1: the decode kernels do not divide the input dimension")
