"""From the sizes seen in several probes to exact expressions in the shape symbols.

A probe is one forward at one shape. Every dimension of every tensor that a kernel touches is a
vector over the probes, and is fitted on its own: an integer combination of at most two monomials,
exact on every probe, and the only such combination with that few terms (the second may be a negative
constant: a causal VAE makes 4 f - 3 frames). Sizes are products and sums
of dimensions, so their expressions are products and sums too and no size is ever fitted whole.
A dimension that does not fit, or fits in two ways, is an error: never an approximation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, product
from math import prod

from paradiff.profiles import SYMBOLS, Expr, InvalidProfile

Shape = tuple[int, ...]
Quantity = tuple[Shape, ...]
"""A sum over shapes of the product of their dimensions: a kernel dimension, as recorded."""
Monomial = tuple[tuple[str, int], ...]


class FitError(InvalidProfile):
    """A recorded dimension is no (unique) combination of the symbols."""


def value(quantity: Quantity) -> int:
    """The number that a recorded quantity stands for."""
    return sum(prod(shape) for shape in quantity)


def expr(terms: Iterable[tuple[int, Monomial]]) -> Expr:
    """Sum of ``terms``, like ones merged, in a canonical order."""
    order = f"{SYMBOLS}p"
    merged: Counter[Monomial] = Counter()
    for coefficient, monomial in terms:
        merged[tuple(sorted(monomial, key=lambda atom: (order.index(atom[0]), atom[1])))] += (
            coefficient
        )
    ordered = sorted(
        ((c, m) for m, c in merged.items() if c),
        key=lambda term: (-len(term[1]), [(order.index(s), level) for s, level in term[1]]),
    )
    return Expr(tuple(ordered))


class Fitter:
    """Fits dimensions seen at ``probes``; ``levels`` are the divisions that rows and columns take.

    A transformer knows one level, its patch size; a U-Net 1, 2, 4, 8 (with ceilings).
    ``frame_levels`` are the divisions of frames: more than 1 where patches extend over frames.
    """

    def __init__(
        self,
        probes: Sequence[Mapping[str, int]],
        levels: Sequence[int],
        frame_levels: Sequence[int] = (1,),
    ) -> None:
        self.probes = probes
        self._known: dict[Shape, Expr] = {}
        self._vectors = {m: self._evaluate(m) for m in self._monomials(levels, frame_levels)}
        self._by_direction: dict[tuple[Fraction, ...], list[Monomial]] = {}
        for monomial, vector in self._vectors.items():
            if any(vector):
                self._by_direction.setdefault(_direction(vector), []).append(monomial)

    def dimension(self, seen: Sequence[int]) -> Expr:
        """The expression of one dimension, given its size in each probe. Raises FitError."""
        key = tuple(seen)
        if key not in self._known:
            self._known[key] = self._fit(key)
        return self._known[key]

    def quantity(self, seen: Sequence[Quantity]) -> Expr:
        """The expression of a recorded quantity, one per probe. Raises FitError."""
        terms: list[tuple[int, Monomial]] = []
        for shapes in zip(*seen, strict=True):
            if len({len(shape) for shape in shapes}) > 1:
                raise FitError(f"ranks differ between probes: {shapes}")
            factors = [self.dimension(sizes).terms for sizes in zip(*shapes, strict=True)]
            for choice in product(*factors):
                monomial = tuple(atom for _, atoms in choice for atom in atoms)
                terms.append((prod(c for c, _ in choice), monomial))
        return expr(terms)

    def _monomials(self, levels: Sequence[int], frame_levels: Sequence[int]) -> list[Monomial]:
        """Candidates: batch and frames times (rows, columns at one level | text), halo alone.

        Symbols that are the same in every probe are left out, and k where it is always r. Only a
        constant (heads, channels, groups) is ever divided by p."""
        varied = {s for s in SYMBOLS if len({probe[s] for probe in self.probes}) > 1}
        if all(probe["k"] == probe["r"] for probe in self.probes):
            varied.discard("k")
        grids: list[Monomial] = [()]
        for level in levels:
            r, w, k = ("r", level), ("w", level), ("k", level)
            grids += [(r,), (w,), (r, w), (k,), (k, w)]
        grids += [(("t", 1),), (("s", 1),), (("h", 1),)]
        frames: list[Monomial] = [(("f", level),) for level in frame_levels]
        b = ("b", 1)
        outer: list[Monomial] = [(), (b,), *frames, *((b, *each) for each in frames)]
        divided: list[Monomial] = [(("p", 1),)] * any("p" in probe for probe in self.probes)
        return divided + [
            (*head, *grid)
            for head in outer
            for grid in grids
            if all(symbol in varied for symbol, _ in (*head, *grid))
        ]

    def _evaluate(self, monomial: Monomial) -> tuple[int | Fraction, ...]:
        if monomial == (("p", 1),):
            return tuple(Fraction(1, probe.get("p", 1)) for probe in self.probes)
        return tuple(
            prod(-(-probe[symbol] // level) for symbol, level in monomial) for probe in self.probes
        )

    def _fit(self, seen: Shape) -> Expr:
        if not any(seen):
            return Expr(())
        single = self._singles(seen)
        found = single or self._pairs(seen) or self._pairs(seen, subtract_constant=True)
        if len(found) != 1:
            options = " or ".join(map(str, found)) or "none"
            raise FitError(f"sizes {seen} at {list(self.probes)}: fits {options}")
        return found[0]

    def _singles(self, seen: Shape) -> list[Expr]:
        matches = []
        for monomial in self._by_direction.get(_direction(seen), []):
            at = next(i for i, size in enumerate(seen) if size)
            coefficient = Fraction(seen[at], self._vectors[monomial][at])
            if coefficient.denominator == 1:
                matches.append(expr([(int(coefficient), monomial)]))
        return matches

    def _pairs(self, seen: Shape, *, subtract_constant: bool = False) -> list[Expr]:
        """All a*m + c*n with positive integers a, c: eliminated exactly from two probes.

        With ``subtract_constant`` all c*n - a instead."""
        matches = []
        for (m, x), (n, y) in combinations(self._vectors.items(), 2):
            other = next((i for i in range(1, len(seen)) if x[0] * y[i] != x[i] * y[0]), None)
            if other is None:
                continue
            i = other
            det = x[0] * y[i] - x[i] * y[0]
            a, rest = divmod(seen[0] * y[i] - seen[i] * y[0], det)
            c, rest2 = divmod(x[0] * seen[i] - x[i] * seen[0], det)
            if rest or rest2 or c <= 0 or (a >= 0 or m if subtract_constant else a <= 0):
                continue
            if all(a * p + c * q == size for p, q, size in zip(x, y, seen, strict=True)):
                matches.append(expr([(a, m), (c, n)]))
        return matches


def _direction(vector: Sequence[int | Fraction]) -> tuple[Fraction, ...]:
    """The vector up to scale: equal for two vectors iff one is a multiple of the other."""
    first = next(size for size in vector if size)
    return tuple(Fraction(size, first) for size in vector)
