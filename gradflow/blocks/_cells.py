"""The law of an LSTM's cells over units, which second moments do not give.

A unit's cell goes from c to c' = f c + i g. At infinite width, and with weights that are drawn anew
at every step, f = σ(√K z_f + b_f), i = σ(√K z_i + b_i) and g = tanh(√K z_g) have independent normal
z, of which c is independent. A sum of such products is not Gaussian, and E[tanh(c)²] needs its
law.

The law is kept as weights w_k on nodes c_k, E[F(c)] = Σ_k w_k F(c_k): F is interpolated between the
nodes, and w_k = E[ℓ_k(c)] with the interpolating functions ℓ_k. A step makes of them

    w'_l = Σ_k w_k E[ℓ_l(f c_k + i g)],

in two, c -> y = f c and y -> y + i g. The law of two sites' cells is weights on pairs of nodes, for
which Mehler's formula, E[F(z_a) G(z_b)] = Σ_m ρ^m E[F h_m] E[G h_m] with the correlation ρ and
Hermite's polynomials h_m of norm 1, averages over gates by products of each site's own matrices.

A *tangent* of the cells is τ_k = E[ċ² ℓ_k(c)]: it has been multiplied by f like c, and so depends
on c. That of h is a product with a random matrix, and independent.

Nodes are Chebyshev's in x, where c = (π/2) sinh(a x): however far cells reach, tanh(c), with its
poles at ±iπ/2, needs about equally many. They reach to 10 standard deviations of c.
Beside twice as many nodes and points of z, logarithms of q and of the gradient's variance are right
to 1e-5 over 15 steps from a state of q = 1 with σ_w up to 2.5, and to 4e-4 with σ_w = 10; to 1e-3
from a state of q = 10, and to 1e-2 from one of 100. One step of one site takes about 10 ms on a
core, and each pair of sites as much again.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from gradflow._norms import inverse_or_zero
from gradflow.activations import Activation, logistic
from gradflow.errors import InputError
from gradflow.kernels import Kernel, UnitDistribution, Unknown

__all__ = ["Cells", "Tangent"]

_NODES = 40
_POLE = math.pi / 2
_DEVIATIONS = 10.0
# The smallest variance of cells; one below it counts as 0.
_LEAST = 1e-32
# Of a gate and of g: where its nearest pole is, ±i times this, points of the rule for averages, and
# Hermite's polynomials for pairs.
_GATE, _CANDIDATE = (math.pi, 20, 8), (math.pi / 2, 28, 22)
_Z_MAX = 7.0
# z of Gaussian cells, where a walk begins, for the trapezoid rule.
_Z = np.linspace(-8, 8, 97)


class Tangent(NamedTuple):
    """Second moments of a tangent: τ of the cells, and E[ḣ²]."""

    cells: Float[Array, "sites nodes"]
    hidden: Float[Array, " sites"]


class Cells(UnitDistribution):
    """The law of an LSTM's state: half of the units are cells c, the others h = o tanh(c).

    Attributes
    ----------
    reach
        Shape (sites,): the cell beyond all nodes.
    weights
        Shape (sites, nodes): w of each site's cells.
    pairs
        Shape (pairs, nodes, nodes): weights of two sites' cells, the one of the lower number first.
    hidden
        Shape (sites, sites): E[h_a h_b].
    memory
        Second moments of a tangent, where gradients are computed.
    """

    reach: Float[Array, " sites"]
    weights: Float[Array, "sites nodes"]
    pairs: Float[Array, "pairs nodes nodes"]
    hidden: Float[Array, "sites sites"]
    memory: Tangent | None = None

    @classmethod
    def of(cls, kernel: Kernel) -> "Cells":
        """Return the law of signals that are a state, or Gaussian, c and h independent.

        Raises
        ------
        InputError
            If they are neither.
        """
        law = kernel.distribution
        if not isinstance(law, Cells):
            if not kernel.gaussian:
                raise InputError(
                    "an LSTM gets a signal that is neither Gaussian over units nor an LSTM's "
                    "state; the theory needs a random matrix (Linear, Dense) before it"
                )
            law = _gaussian_cells(kernel.covariance)
        if kernel.tangent is None or law.memory is not None:
            return law
        return law.with_memory(law.memory_of_independent(kernel.tangent))

    def initial_carry(self, kernel: Kernel) -> "Cells":
        """Return the law of a state."""
        return Cells.of(kernel)

    @property
    def has_memory(self) -> bool:
        """Whether it has a memory: yes, a tangent's second moments depend on the cell."""
        return True

    def with_memory(self, memory: Tangent | None) -> "Cells":
        """Return the law with this memory of a tangent."""
        return dataclasses.replace(self, memory=memory)

    def memory_of_independent(self, tangent: Float[Array, "..."]) -> Tangent:
        """Return the memory of a tangent of these second moments, independent of the state.

        Raises
        ------
        InputError
            If they are of pairs of sites.
        """
        if tangent.ndim > 1:
            raise InputError(
                "an LSTM is in a network with a block that mixes inputs' gradients (BatchNorm, "
                "UnitVariance, a convolution); its theory of gradients is of each input by itself"
            )
        return Tangent(self.weights * tangent[:, None], tangent)

    def through(self, kernel: Kernel, activation: Activation) -> Kernel:
        """Refuse, as `Unknown` does."""
        return Unknown().through(kernel, activation)

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> Unknown:  # noqa: ARG002
        """Return an unknown law: a multiple of a state is no state."""
        return Unknown()

    def second_moments(self, f: Array) -> Float[Array, "sites sites"]:
        """Return E[F(c_a) F(c_b)] from the values of F at each site's nodes, (sites, nodes)."""
        a, b = _pairs(len(f))
        both = _sum("pjk,pj,pk->p", self.pairs, f[a], f[b])
        own = jnp.diag(jnp.maximum(jnp.sum(self.weights * f**2, axis=1), 0))
        return own.at[a, b].set(both).at[b, a].set(both)

    @property
    def cells(self) -> Float[Array, "sites nodes"]:
        """The nodes c_k of each site."""
        return jax.vmap(_nodes)(self.reach)

    def kernel(self) -> Kernel:
        """Return the state's kernel as of any signal: means over its two halves."""
        covariance = (self.second_moments(self.cells) + self.hidden) / 2
        mean = jnp.zeros_like(self.reach)
        tangent = None
        if self.memory is not None:
            tangent = (jnp.sum(self.memory.cells, axis=1) + self.memory.hidden) / 2
        return Kernel(covariance, mean, tangent, self)

    def stepped(
        self,
        forget: Kernel,
        gate: Kernel,
        candidate: Kernel,
        opened: Kernel,
        biases: tuple[ScalarLike, ScalarLike],
    ) -> "Cells":
        """Return the law of the next state, at infinite width.

        Parameters
        ----------
        forget, gate, candidate
            The kernels of the arguments of f, i and g, Gaussian of equal second moments.
        opened
            The kernel of o.
        biases
            The means of the biases of f and i.
        """
        k = forget.covariance
        root = jnp.sqrt(jnp.diagonal(k))
        taken = None
        if self.memory is not None:
            taken = (self.memory.cells, forget.tangent, gate.tangent, candidate.tangent)
        step = functools.partial(_step, biases=biases)
        one = jax.vmap(step)(root, self.reach, self.weights, taken)
        a, b = _pairs(len(root))
        rho = k[a, b] * inverse_or_zero(root[a] * root[b])
        pairs = self.pairs
        for moving in (one.kept, one.added):
            pairs = jax.vmap(_moved)(pairs, rho, moving[a], moving[b])
        after = Cells(one.reach, one.weights, pairs, self.hidden)
        squashed = jnp.tanh(after.cells)
        hidden = opened.covariance * after.second_moments(squashed)
        memory = None
        if one.tangent is not None:
            # ḣ' = o tanh'(c') ċ' + ȯ tanh(c')
            by_cell = jnp.sum(one.tangent * (1 - squashed**2) ** 2, axis=1)
            by_output = jnp.sum(after.weights * squashed**2, axis=1)
            assert opened.tangent is not None
            own = jnp.diagonal(opened.covariance) * by_cell + opened.tangent * by_output
            memory = Tangent(one.tangent, own)
        return Cells(one.reach, one.weights, pairs, hidden, memory)


class _Stepped(NamedTuple):
    """One site's next cells, and E[ℓ_l(c') h_m | c] of its two halves, for pairs."""

    reach: Float[Array, "*sites"]
    weights: Float[Array, "*sites nodes"]
    tangent: Float[Array, "*sites nodes"] | None
    kept: Float[Array, "*sites orders 1 nodes nodes"]
    added: Float[Array, "*sites orders more_orders nodes nodes"]


def _step(
    root: Float[Array, ""],
    reach: Float[Array, ""],
    weights: Float[Array, " nodes"],
    taken: tuple[Any, ...] | None,
    biases: tuple[ScalarLike, ScalarLike],
) -> _Stepped:
    dtype = weights.dtype
    (z, by_order), (z_g, by_order_g) = (_rule(root, *of) for of in (_GATE, _CANDIDATE))
    chance, chance_g = by_order[0], by_order_g[0]
    f, i = (logistic(root * z + jnp.asarray(bias, dtype)) for bias in biases)
    g = jnp.tanh(root * z_g)
    c = _nodes(reach)
    middle = _dot(chance, f**2) * _dot(weights, c**2)
    after = middle + _dot(chance, i**2) * _dot(chance_g, g**2)
    middle, after = _reach(middle), _reach(after)
    kept = _polynomials(jnp.outer(f, c), middle)
    shifts = jnp.outer(i, g)[..., None]
    added = _polynomials(shifts + _nodes(middle)[None, None], after)

    def keep(by_gate: Array, weights: Array) -> Array:
        return _to_nodes(_sum("p,j,kpj->k", chance * by_gate, weights, kept))

    def add(by_gate: Array, by_candidate: Array, weights: Array) -> Array:
        by_gates = chance * by_gate, chance_g * by_candidate
        return _to_nodes(_sum("p,q,j,kpqj->k", *by_gates, weights, added))

    one, one_g = jnp.ones_like(f), jnp.ones_like(g)
    renewed = keep(one, weights)
    moved = None
    if taken is not None:
        own, of_forget, of_gate, of_candidate = taken
        # ċ' = f ċ + c ḟ + g i̇ + i ġ
        passed = keep(f**2, own) + of_forget * keep((f * (1 - f)) ** 2, c**2 * weights)
        moved = add(one, one_g, passed)
        moved += of_gate * add((i * (1 - i)) ** 2, g**2, renewed)
        moved += of_candidate * add(i**2, (1 - g**2) ** 2, renewed)
    return _Stepped(
        after,
        add(one, one_g, renewed),
        moved,
        _to_nodes(_sum("mp,kpj->mjk", by_order, kept))[:, None],
        _to_nodes(_sum("mp,nq,kpqj->mnjk", by_order, by_order_g, added)),
    )


def _moved(
    weights: Float[Array, "nodes nodes"],
    rho: Float[Array, ""],
    a: Float[Array, "orders more_orders nodes nodes"],
    b: Float[Array, "orders more_orders nodes nodes"],
) -> Float[Array, "nodes nodes"]:
    """Return two cells' weights after a move, by Mehler's formula."""
    m, n = a.shape[:2]
    power = jnp.cumprod(jnp.full(m + n - 1, rho).at[0].set(1))[np.add.outer(range(m), range(n))]
    after_b = _sum("jk,mnkl->mnjl", weights, b)
    return _sum("mn,mnji,mnjl->il", power, a, after_b)


def _gaussian_cells(k: Float[Array, "sites sites"]) -> Cells:
    """Return the law of a state of which c and h are Gaussian and have these second moments."""
    root = jnp.sqrt(jnp.diagonal(k))
    reach = _reach(root**2)
    z = jnp.asarray(_Z, k.dtype)
    chance = jnp.exp(-(z**2) / 2)
    chance = chance / jnp.sum(chance)

    def pair(k: Array, a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        (root_a, reach_a), (root_b, reach_b) = a, b
        rho = jnp.clip(k * inverse_or_zero(root_a * root_b), -1, 1)
        at_b = root_b * (rho * z[:, None] + jnp.sqrt(1 - rho**2) * z[None])
        given_a = _sum("q,kpq->pk", chance, _polynomials(at_b, reach_b))
        at_a = _polynomials(root_a * z, reach_a)
        both = _sum("p,jp,pk->jk", chance, at_a, given_a)
        return _to_nodes(_to_nodes(both).T).T

    def one(root: Array, reach: Array) -> Array:
        return _to_nodes(_sum("p,kp->k", chance, _polynomials(root * z, reach)))

    a, b = _pairs(len(k))
    pairs = jax.vmap(pair)(k[a, b], (root[a], reach[a]), (root[b], reach[b]))
    return Cells(reach, jax.vmap(one)(root, reach), pairs, k)


def _pairs(sites: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(sites, 1)


# Chebyshev's nodes, and the interpolating functions in terms of his polynomials.
_ANGLES = (np.arange(_NODES) + 0.5) * math.pi / _NODES
_TO_NODES = 2 / _NODES * np.cos(np.arange(_NODES)[:, None] * _ANGLES)
_TO_NODES[0] /= 2


def _nodes(reach: Float[Array, ""]) -> Float[Array, " nodes"]:
    x = jnp.asarray(np.cos(_ANGLES), reach.dtype)
    return _POLE * jnp.sinh(jnp.arcsinh(reach / _POLE) * x)


def _reach(variance: Float[Array, "*sites"]) -> Float[Array, "*sites"]:
    return _DEVIATIONS * jnp.sqrt(jnp.maximum(variance, _LEAST))


def _polynomials(
    c: Float[Array, "*points"], reach: Float[Array, ""]
) -> Float[Array, "nodes *points"]:
    """Return Chebyshev's polynomials at c; those of the nearest end beyond the nodes."""
    x = jnp.clip(jnp.arcsinh(c / _POLE) / jnp.arcsinh(reach / _POLE), -1, 1)

    def further(last: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        return (last[1], 2 * x * last[1] - last[0]), last[0]

    return jax.lax.scan(further, (jnp.ones_like(x), x), None, length=_NODES)[1]


def _to_nodes(values: Float[Array, "*of nodes"]) -> Float[Array, "*of nodes"]:
    """Return the averages of ℓ_k from those of Chebyshev's polynomials."""
    return jnp.matmul(
        values, jnp.asarray(_TO_NODES, values.dtype), precision=jax.lax.Precision.HIGHEST
    )


def _rule(
    root: Float[Array, ""], pole: float, count: int, orders: int
) -> tuple[Float[Array, " points"], Float[Array, "orders points"]]:
    """Return z, and chances times h_m(z), to average F(√K z): F has poles at ±i ``pole``.

    The trapezoid rule, in x of z = s sinh(a x) with the poles at ±i s.
    """
    scale = pole / jnp.maximum(root, 0.5)
    far = jnp.arcsinh(_Z_MAX / scale)
    z = scale * jnp.sinh(far * jnp.linspace(-1, 1, count, dtype=root.dtype))
    chance = jnp.sqrt(scale**2 + z**2) * jnp.exp(-(z**2) / 2)
    h = [jnp.ones_like(z), z]
    for m in range(1, orders - 1):
        h.append((z * h[m] - m**0.5 * h[m - 1]) / (m + 1) ** 0.5)
    return z, jnp.stack([chance / jnp.sum(chance) * one for one in h])


_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
_sum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
