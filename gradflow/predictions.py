"""Predictions: what theory says of every statistic at every layer, and of the width's effect."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow._labels import Values, labelled, layers, with_names

if TYPE_CHECKING:
    import xarray

__all__ = ["Corrections", "Prediction"]


class Prediction(eqx.Module):
    """Theory's value of each statistic at each layer: a pytree of arrays of shape (layers,).

    Attributes
    ----------
    values
        By key: positive quantities as natural logarithms, under ``log_<name>``.
    why_missing
        One sentence that says why some layers have no number (NaN), or None.
    """

    values: dict[str, Array | np.ndarray] = eqx.field(converter=Values)
    why_missing: str | None = eqx.field(static=True, default=None)

    def __getitem__(self, name: str) -> Array | np.ndarray:
        """A statistic's values, (layers,), by its key; by its name, in its own unit, no logarithm.

        Raises
        ------
        UnknownName
            If there is none of this name.
        """
        return self.values[name]

    def __repr__(self) -> str:
        """The shape and the statistics' keys, in one line."""
        shape = jnp.shape(next(iter(self.values.values()), jnp.zeros(0)))
        return f"theory of shape {shape}, the last axis that of layers: {', '.join(self.values)}"

    def to_xarray(self) -> "xarray.Dataset":
        """The labelled values: every quantity by its name and, where it has one, its logarithm."""
        import xarray  # noqa: PLC0415  (slow to import)

        return labelled(
            xarray.Dataset(
                {name: ("layer", np.asarray(v)) for name, v in with_names(self.values).items()},
                coords={"layer": layers(len(next(iter(self.values.values()))))},
            )
        )


class Corrections(eqx.Module):
    """What finite width does to every statistic, by key, each of shape (layers,).

    Attributes
    ----------
    shift
        To be added to what `mean_field.predict` returns; that of a logarithm where it is one.
    standard_deviation
        Over networks; of a statistic that is carried as a logarithm, as a share of its mean.
    effect
        The name of the one effect that ``shift`` is of; None where it is all of order 1/n.
    """

    shift: dict[str, Array | np.ndarray]
    standard_deviation: dict[str, Array | np.ndarray]
    effect: str | None = eqx.field(static=True, default=None)
