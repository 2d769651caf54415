"""Random matrices that multiply, W x and Wᵀ y: drawn, or decided only as far as they are used.

A matrix has entries of variance 1 and a transpose, ``.T``; ``product, matrix = matrix.times(x)``
gives x Wᵀ for rows x, and the matrix that remembers this product. `Drawn` holds its entries,
`Redrawn` draws them again for each product. `Gaussian` and `Orthogonal` never have any, and yet
their products with *any* sequence of vectors, each of which may depend on all products before it,
have exactly the joint law of the products of a drawn W: the principle of deferred decisions (Lu
2021, 'Householder Dice', IEEE Trans. Inf. Theory 67(12), arXiv:2101.07464; there by reflections,
here by the vectors and products themselves).

Why it is exact. Only new directions matter: x is split into its part along earlier vectors, whose
products are known, and a rest; let a be the rest at length 1.

*Independent N(0, 1) entries.* Let the columns of Q be the orthonormal vectors so far, W Q = G,
and those of P the vectors that the transpose has multiplied, Wᵀ P = H. Then

    W = G Qᵀ + P Hᵀ (I - Q Qᵀ) + (I - P Pᵀ) W (I - Q Qᵀ),

where only the last term is not known yet. For fixed Q and P it is independent of G and H, since
orthogonal combinations of Gaussian entries are. It stays so for vectors chosen from the products:
each is a function of vectors and products that the deferred term is independent of. A fresh copy W̃
of W can therefore take its place there, and for a ⟂ Q

    W a = P (Hᵀ a) + (I - P Pᵀ) g,   g = W̃ a ~ N(0, I).

*Haar-orthogonal.* b = W a is also a = Wᵀ b: each product is one of the transpose too. All that is
known is thus W A = B with A and B orthonormal, whichever side was multiplied; and the rest of W is
a Haar-orthogonal map from A's complement to B's, since the law does not change under rotations of
either. So a new a goes to a direction uniform in B's complement, b = (I - B Bᵀ) g at length 1. A
matrix that is not square is a corner of a square one: vectors are padded with zeros and products
cut.

k products take O((n_in + n_out) k²) operations; none takes n_in n_out.
"""

import abc
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow._checks import is_traced
from gradflow._norms import unit_rows
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.simulation import _threefry

__all__ = ["LARGE_TILE", "Drawn", "Gaussian", "Matrix", "Orthogonal", "Redrawn"]
__all__ += ["drawn", "orthonormal_rows", "redrawn", "deferred"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _products(x: Float[Array, "k n"], rows: Float[Array, "others n"]) -> Array:
    """Return x rowsᵀ: for one x, on a CPU, 20 times as fast as with a transpose."""
    contracted = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, rows, contracted, precision=jax.lax.Precision.HIGHEST)


class Matrix(eqx.Module):
    """A random matrix of shape (n_out, n_in)."""

    @property
    @abc.abstractmethod
    def T(self) -> "Matrix":  # noqa: N802
        """The transpose, with the same products remembered."""

    @abc.abstractmethod
    def times(self, x: Float[Array, "k n_in"]) -> tuple[Float[Array, "k n_out"], "Matrix"]:
        """Return x Wᵀ, which is W times each row, and the matrix that remembers this product.

        The next product is that of the matrix which is returned: one without entries is the same
        matrix only if it remembers.

        Raises
        ------
        InputError
            If it has a fixed number of places for products and they are used up. Inside a traced
            program, which cannot raise, the product is NaN.
        """

    def with_places(self, more: int) -> "Matrix":
        """Return the matrix with places for ``more`` products with it, and with its transpose."""
        places = more * (2 if isinstance(self, Orthogonal) else 1)  # one store for both sides
        return jax.tree.map(
            lambda leaf: leaf.with_places(places) if isinstance(leaf, Rows) else leaf,
            self,
            is_leaf=lambda leaf: isinstance(leaf, Rows),
        )


class Drawn(Matrix):
    """All entries."""

    weights: Float[Array, "n_out n_in"]  # of the matrix or, if ``transposed``, of its transpose
    transposed: bool = eqx.field(static=True, default=False)

    @property
    def T(self) -> "Drawn":  # noqa: N802
        """The transpose."""
        return Drawn(self.weights, not self.transposed)

    def times(self, x: Float[Array, "k n_in"]) -> tuple[Float[Array, "k n_out"], "Drawn"]:
        """Return x Wᵀ."""
        multiply = _matmul if self.transposed else _products
        return multiply(x, self.weights), self


# Entries that are drawn at a time on a CPU: as many as stay in a core's own cache or, where every
# entry is used many times, as many as a matrix product is fast with.
_TILE, LARGE_TILE, _MANY_ROWS = 1 << 16, 1 << 20, 32


class Redrawn(Matrix):
    """Independent N(0, 1) entries, those of `Drawn`, drawn again for each product.

    Drawing an entry takes no longer than fetching it from memory. On a CPU a few rows of it are
    drawn, multiplied and forgotten at a time, so that the matrix is never in memory; an accelerator
    draws all of it at once.
    """

    key: PRNGKeyArray
    n_out: int = eqx.field(static=True)
    n_in: int = eqx.field(static=True)
    transposed: bool = eqx.field(static=True, default=False)

    @property
    def T(self) -> "Redrawn":  # noqa: N802
        """The transpose."""
        return Redrawn(self.key, self.n_out, self.n_in, not self.transposed)

    def times(self, x: Float[Array, "k n_in"]) -> tuple[Float[Array, "k n_out"], "Redrawn"]:
        """Return x Wᵀ."""
        k, (tiles, height) = len(x), self._tiles(len(x))

        def rows(tile: Array) -> Array:
            first = tile.astype(jnp.uint32) * np.uint32(height * self.n_in // 2)
            return _threefry.normal(self.key, (height, self.n_in), x.dtype, first_pair=first)

        if not self.transposed:
            out = jax.lax.map(lambda tile: _products(x, rows(tile)), jnp.arange(tiles))
            return out.transpose(1, 0, 2).reshape(k, -1)[:, : self.n_out], self

        def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            tile, x = part
            return total + _matmul(x, rows(tile)), None

        x = jnp.pad(x, ((0, 0), (0, tiles * height - self.n_out)))
        parts = (jnp.arange(tiles), x.reshape(k, tiles, height).transpose(1, 0, 2))
        return jax.lax.scan(add, jnp.zeros((k, self.n_in), x.dtype), parts)[0], self

    def _tiles(self, k: int) -> tuple[int, int]:
        """Return the number of tiles and of rows in each, an even number; one tile off CPUs."""
        if jax.default_backend() != "cpu":
            return 1, self.n_out
        size = _TILE if k < _MANY_ROWS else LARGE_TILE
        height = min(2 * max(1, size // (2 * self.n_in)), self.n_out + self.n_out % 2)
        return -(-self.n_out // height), height


class Rows(eqx.Module):
    """Rows to which others are added: without end or, in a compiled loop, up to some places.

    In blocks, so that more places, where all are used, move nothing in memory.
    """

    rows: Float[Array, "*stacked places n"]  # of the last block; those not used yet are 0
    used: Int[Array, "*stacked"] | None  # of the last block; None where there are no places
    earlier: tuple[Float[Array, "*stacked _ n"], ...] = ()  # the blocks before it

    @classmethod
    def none(cls, n: int, places: int | None, dtype: DTypeLike) -> "Rows":
        """Return no rows of length n."""
        used = None if places is None else jnp.zeros((), jnp.int32)
        return cls(jnp.zeros((places or 0, n), dtype), used)

    @property
    def blocks(self) -> list[Float[Array, "*stacked _ n"]]:
        """All rows, in blocks that are not empty."""
        return [block for block in (*self.earlier, self.rows) if block.shape[-2]]

    @property
    def places(self) -> int:
        """The number of rows, or of places for them, in all blocks."""
        return sum(block.shape[-2] for block in self.blocks)

    def with_places(self, more: int) -> "Rows":
        """Return the same rows with more places; there may be axes before those of rows."""
        if self.used is None:
            return self
        *stacked, places, n = self.rows.shape
        if places and not is_traced(self.used) and np.all(np.asarray(self.used) == places):
            empty = jnp.zeros((*stacked, more, n), self.rows.dtype)
            return Rows(empty, jnp.zeros_like(self.used), (*self.earlier, self.rows))
        padding = [(0, 0)] * len(stacked) + [(0, more), (0, 0)]
        return Rows(jnp.pad(self.rows, padding), self.used, self.earlier)

    def and_(self, new: Float[Array, "k n"]) -> "Rows":
        """Return these rows and new ones."""
        if self.used is None:
            return Rows(jnp.concatenate([self.rows, new]), None)
        places, used = self.rows.shape[0], self.used + new.shape[0]
        taken = new.shape[0] if is_traced(used) else int(used)
        if taken > places:
            needed = self.places - places + taken
            raise InputError(
                f"places is {self.places}, and one side of a matrix made {needed} products; give "
                "it at least as many"
            )
        rows = jax.lax.dynamic_update_slice_in_dim(self.rows, new, self.used, 0)
        return Rows(rows, used, self.earlier)

    def combined(self, coefficients: Float[Array, "k rows"]) -> Float[Array, "k n"]:
        """Return the sum of the rows times these."""
        total = jnp.zeros((len(coefficients), self.rows.shape[1]), self.rows.dtype)
        first = 0
        for block in self.blocks:
            total += _matmul(coefficients[:, first : first + len(block)], block)
            first += len(block)
        return total

    def with_new(self, along: Float[Array, "k rows"], new: Float[Array, "k new"]) -> Array:
        """Return coefficients of these rows and of those that are put beside them next."""
        if self.used is None:
            return jnp.concatenate([along, new], axis=1)
        index = self.places - self.rows.shape[0] + self.used
        return jax.lax.dynamic_update_slice_in_dim(along, new, index, 1)

    def or_nan(self, product: Array) -> Array:
        """Return a product with one of these rows; NaN if there was no place for the row."""
        full = False if self.used is None else self.used > self.rows.shape[0]
        return jnp.where(full, jnp.nan, product)


class Gaussian(Matrix):
    """Independent N(0, 1) entries, of which only products are drawn."""

    key: PRNGKeyArray
    count: Int[Array, ""]  # of calls, to either side: each has random numbers of its own
    inputs: Rows  # Qᵀ
    outputs: Rows  # Gᵀ
    inputs_back: Rows  # Pᵀ
    outputs_back: Rows  # Hᵀ

    @property
    def T(self) -> "Gaussian":  # noqa: N802
        """The transpose, with the same products remembered."""
        back, forward = (self.inputs_back, self.outputs_back), (self.inputs, self.outputs)
        return Gaussian(self.key, self.count, *back, *forward)

    def times(self, x: Float[Array, "k n_in"]) -> tuple[Float[Array, "k n_out"], "Gaussian"]:
        """Return x Wᵀ, exactly in law."""
        x = x.astype(self.inputs.rows.dtype)
        new, along = _split(x, self.inputs)
        key = jax.random.fold_in(self.key, self.count)
        products = _normal(key, (x.shape[0], self.outputs.rows.shape[1]), x.dtype)
        for p, h in zip(self.inputs_back.blocks, self.outputs_back.blocks, strict=True):
            products += _matmul(_products(new, h) - _products(products, p), p)
        matrix = Gaussian(
            self.key,
            self.count + 1,
            self.inputs.and_(new),
            self.outputs.and_(products),
            self.inputs_back,
            self.outputs_back,
        )
        # From the products with the new ones in their places, which need not be copied then.
        along = self.outputs.with_new(along, _products(x, new))
        return matrix.inputs.or_nan(matrix.outputs.combined(along)), matrix


class Orthogonal(Matrix):
    """Haar-orthogonal, scaled to entries of variance 1; only products are drawn.

    More rows than columns: the columns are orthogonal and of equal length, or else the rows are.
    """

    key: PRNGKeyArray
    count: Int[Array, ""]  # of calls, to either side: each has random numbers of its own
    inputs: Rows  # Aᵀ, rows of length max(n_in, n_out)
    outputs: Rows  # Bᵀ
    n_in: int = eqx.field(static=True)
    n_out: int = eqx.field(static=True)

    @property
    def T(self) -> "Orthogonal":  # noqa: N802
        """The transpose, with the same products remembered."""
        known = (self.outputs, self.inputs)
        return Orthogonal(self.key, self.count, *known, self.n_out, self.n_in)

    def times(self, x: Float[Array, "k n_in"]) -> tuple[Float[Array, "k n_out"], "Orthogonal"]:
        """Return x Wᵀ, exactly in law."""
        n = max(self.n_in, self.n_out)
        x = jnp.pad(x.astype(self.inputs.rows.dtype), ((0, 0), (0, n - self.n_in)))
        new, along = _split(x, self.inputs)
        fresh = _normal(jax.random.fold_in(self.key, self.count), x.shape, x.dtype)
        # A vector without a new part must not take up a direction of the complement.
        fresh *= jnp.any(new != 0, axis=1, keepdims=True)
        products, _ = _split(fresh, self.outputs)
        matrix = Orthogonal(
            self.key,
            self.count + 1,
            self.inputs.and_(new),
            self.outputs.and_(products),
            self.n_in,
            self.n_out,
        )
        along = self.outputs.with_new(along, _products(x, new))
        out = matrix.outputs.combined(along)
        return matrix.inputs.or_nan(math.sqrt(n) * out[:, : self.n_out]), matrix


def redrawn(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    distribution: Distribution,
    dtype: DTypeLike = jnp.float32,
) -> Drawn | Redrawn:
    """Return the matrix that `drawn` draws, for few products: held only if it must be."""
    if distribution.iid_gaussian and _threefry.drawn_here(key, dtype):
        return Redrawn(key, *shape)
    return drawn(key, shape, distribution, dtype)


def drawn(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    distribution: Distribution,
    dtype: DTypeLike = jnp.float32,
) -> Drawn:
    """Draw all entries of a random matrix of shape (n_out, n_in), of any law."""
    # The law says all of independent Gaussians, so that they may be drawn as is fastest.
    draw = _threefry.normal if distribution.iid_gaussian else distribution.draw
    return Drawn(draw(_threefry.fused(key), shape, dtype))


def deferred(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    distribution: Distribution,
    dtype: DTypeLike = jnp.float32,
    *,
    places: tuple[int, int] | None = None,
) -> Gaussian | Orthogonal:
    """Return a random matrix that is decided only as far as products need it.

    Parameters
    ----------
    key
        Decides, together with the vectors, all products.
    shape
        (n_out, n_in).
    distribution
        Of independent Gaussian entries, or Haar-orthogonal.
    dtype
        Of the products.
    places
        The number of rows x of W x, and y of Wᵀ y, that there is room for. Without it there is no
        limit, but the arrays grow, as they must not in a `jax.lax.scan` over products.

    Raises
    ------
    InputError
        If the law is not one of these two.
    """
    n_out, n_in = shape
    count = jnp.zeros((), jnp.int32)
    if distribution.iid_gaussian:
        forth, back = (None, None) if places is None else places
        sides = ((n_in, forth), (n_out, forth), (n_out, back), (n_in, back))
        return Gaussian(key, count, *(Rows.none(n, size, dtype) for n, size in sides))
    if distribution.haar:
        none = Rows.none(max(shape), None if places is None else sum(places), dtype)
        return Orthogonal(key, count, none, none, n_in, n_out)
    raise not_invariant(distribution)


def not_invariant(distribution: Distribution) -> InputError:
    """Return the error for a law that cannot be left deferred."""
    return InputError(
        f"sampler 'matrix_free' cannot draw {distribution.name!r} weights; it needs independent "
        "Gaussian or orthogonal ones: use sampler 'dense' or 'auto', or such weights of the same "
        "variance"
    )


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    # The compiler would rather draw them again for each use than keep them.
    return jax.lax.optimization_barrier(_threefry.normal(key, shape, dtype))


def orthonormal_rows(
    x: Float[Array, "k n"], known: Float[Array, "others n"] | None = None
) -> Float[Array, "k n"]:
    """Return orthonormal rows with which the known ones span what they span with x.

    A row is 0 where x adds no direction. Gram-Schmidt, with every row orthogonalised twice, which
    is enough for full precision (Giraud, Langou & Rozložník 2005). Zero rows for repeated or
    vanished x keep the products exact: they add no direction that does not exist.

    Parameters
    ----------
    x
        Of any lengths.
    known
        Orthonormal rows, or zeros, to be orthogonal to.
    """
    return _split(x, Rows(x[:0] if known is None else known, None))[0]


def _split(x: Float[Array, "k n"], known: Rows) -> tuple[Float[Array, "k n"], Float[Array, "k _"]]:
    """Return `orthonormal_rows`, and x knownᵀ. Wide matrices spend their time reading ``known``."""
    k = x.shape[0]
    others = known.places
    # A unit row that keeps less than this of its length lies in the span of the rows before it.
    dependent = 10 * jnp.finfo(x.dtype).eps * (k + others) ** 0.5

    def at_unit_length(row: Array) -> Array:
        length = jnp.linalg.norm(row)
        return row * jnp.where(length < dependent, 0, 1 / jnp.maximum(length, dependent))

    def without_known(units: Array) -> tuple[Array, Array]:
        along = [jnp.zeros((k, 0), x.dtype)]
        for block in known.blocks:
            along.append(_products(units, block))
            units -= _matmul(along[-1], block)
        return units, jnp.concatenate(along, axis=1)

    def add_row(rows: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        remainder, index = row

        def less_rows(_: ArrayLike, remainder: Array) -> Array:
            return at_unit_length(remainder - _matmul(_matmul(rows, remainder), rows))

        return rows.at[index].set(jax.lax.fori_loop(0, 2, less_rows, remainder)), None

    def orthonormal(units: Array) -> Array:
        return jax.lax.scan(add_row, jnp.zeros_like(x), (units, jnp.arange(k)))[0]

    units, log_length = unit_rows(x)
    units, along = without_known(units)
    components = jnp.exp(log_length)[:, None] * along
    if k > 1:
        units = orthonormal(units)
        units = orthonormal(without_known(units)[0]) if others else units
    elif others:
        # Once is enough where most of a row is new.
        most = jnp.sum(jnp.square(units)) > 1 / 2
        units = jax.lax.cond(
            most, lambda u: u, lambda u: without_known(at_unit_length(u))[0], units
        )
        units = at_unit_length(units)
    return units, components
