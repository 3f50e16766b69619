"""Orthogonal matrices that spread every input over all outputs, applied factor by factor.

A Hadamard matrix has entries ±1 and orthogonal rows. Sylvester's construction gives those of order
2^k, Paley's ("On Orthogonal Matrices", J. Math. Phys. 12, 1933) those of order q + 1 for primes
q ≡ 3 (mod 4) and 2(q + 1) for primes q ≡ 1 (mod 4), and Kronecker products of both are Hadamard
again. Together they reach the usual hidden sizes: 576 = 16 · 36, 896 = 32 · 28, 960 = 16 · 60.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SYLVESTER_LIMIT = 64  # a larger power of two is split: two small products cost less than one large


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x Q over the last dimension, Q = diag(signs) · (factor ⊗ factor ⊗ ...), in float64."""

    signs: Tensor  # (n,) of ±1
    factors: tuple[Tensor, ...]  # orthogonal, (size, size) each, the sizes' product is n
    is_hadamard: bool

    @property
    def size(self) -> int:
        return self.signs.numel()

    def apply(self, values: Tensor) -> Tensor:
        """x Q for values (..., n); float64 of the same shape."""
        result = values.double() * self.signs
        after = self.size
        for factor in self.factors:
            after //= factor.shape[0]
            result = factor.T @ result.reshape(-1, factor.shape[0], after)
        return result.reshape(values.shape)

    def matrix(self) -> Tensor:
        """Q itself, (n, n)."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def random_rotation(size: int, seed: int) -> Rotation:
    """A Hadamard matrix over √n with random signs, or a random orthogonal one where we know none.

    The same size and seed give the same matrix.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    factors = hadamard_factors(size)
    if factors is None:
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        orthogonal, triangle = torch.linalg.qr(noise)
        signs = triangle.diagonal().sign()  # without them QR prefers some rotations to others
        return Rotation(torch.ones_like(signs), (orthogonal * signs,), False)
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs, tuple(f / math.sqrt(f.shape[0]) for f in factors), True)


def hadamard_factors(size: int) -> tuple[Tensor, ...] | None:
    """Matrices of ±1, float64, whose Kronecker product is Hadamard of order `size`, or None.

    >>> [factor.shape[0] for factor in hadamard_factors(576)], hadamard_factors(172)
    ([36, 16], None)
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return _sylvester_factors(size)
    core = odd
    while size % core == 0:
        paley = _paley(core)
        if paley is not None:
            return (paley, *_sylvester_factors(size // core))
        core *= 2
    return None


def _sylvester_factors(size: int) -> tuple[Tensor, ...]:
    """For a power of two: as few factors of at most SYLVESTER_LIMIT as reach it."""
    if size == 1:
        return ()
    part = min(size, SYLVESTER_LIMIT)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < part:
        matrix = torch.kron(matrix, pair)
    return (matrix, *_sylvester_factors(size // part))


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix of this order, (order, order), None where he gives none."""
    if order % 4:
        return None
    if _is_prime(order - 1):  # order - 1 ≡ 3 (mod 4)
        bordered = _bordered(order - 1)
        bordered[1:, 0] = -1
        return bordered + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(_bordered(q), ones) + torch.kron(identity, diagonal)
    return None


def _bordered(q: int) -> Tensor:
    """(q + 1, q + 1): zero diagonal, ones as border, inside 1 where i − j is a square mod q."""
    squares = {value * value % q for value in range(1, q)}
    row = torch.tensor([0.0] + [1.0 if v in squares else -1.0 for v in range(1, q)]).double()
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = row[(index[:, None] - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
