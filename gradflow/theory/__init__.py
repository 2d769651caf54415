"""Theory: one value a layer, no sampling.

linear_regime
    Glorot & Bengio 2010, eqs. 2-12: variances for φ(z) = z and any widths.
mean_field
    The infinite-width limit of every statistic, for any activation.
float64
    Theory in float64 of a network and its inputs, whatever JAX's x64 setting.
finite_width
    What wide layers' limits leave out: exact, at first order in 1/n, and carried means.
shared_weights
    Lengths and gradients of a GRU or LSTM whose steps all have the same weights.
fixed_points
    Where lengths and correlations settle, and on which depth scales.
criticality
    The edge of chaos: where gradients neither vanish nor explode.
spectrum, spectral_density
    The singular values of the end-to-end Jacobian: moments and edges; density.
transformations
    Activations scaled and shifted so that deep networks stay trainable: DKS and TAT.
architectures
    Residual, normalised and dropout networks: growth with depth, χ, fixed points.
attention
    Exchangeable tokens: averages over attention heads, and transformers' signals over depth.
prescription
    The inverse problem: the scales that make a given network critical.
summary
    Everything that the theory says at one σ_w² and σ_b².
"""

import importlib
from types import ModuleType

__all__ = ["architectures", "attention", "criticality", "finite_width", "fixed_points", "float64"]
__all__ += ["linear_regime", "mean_field", "prescription", "shared_weights", "spectrum"]
__all__ += ["spectral_density", "summary", "transformations"]


def __getattr__(name: str) -> ModuleType:
    """A module of these, imported on first use."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
