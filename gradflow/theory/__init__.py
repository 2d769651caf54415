"""Theory: one value a layer, no sampling.

linear_regime
    Glorot & Bengio 2010, eqs. 2-12: variances for φ(z) = z and any widths.
mean_field
    The infinite-width law of every statistic, for any activation.
densities
    The density of single units' signals: what histograms show.
finite_width
    Exact laws of one input's length and gain, linear and ReLU; the length's 1/n corrections.
corrections
    First order in 1/n of every statistic: the shift of its mean, its spread between networks.
carried_means
    What finite width does to gradients where a mean over units is carried along.
shared_weights
    Lengths and gradients of a GRU or LSTM whose steps all have the same weights.
fixed_points
    Where lengths and correlations settle, and on which depth scales.
criticality
    The edge of chaos: where gradients neither vanish nor explode.
spectrum
    The singular values of the end-to-end Jacobian: moments, edges, density.
transformations
    Activations scaled and shifted so that deep networks stay trainable: DKS and TAT.
architectures
    Residual, normalised and dropout networks: growth with depth, χ, fixed points.
prescription
    The inverse problem: the scales that make a given network critical.
"""

from gradflow.theory import (
    architectures,
    carried_means,
    corrections,
    criticality,
    densities,
    finite_width,
    fixed_points,
    linear_regime,
    mean_field,
    prescription,
    shared_weights,
    spectrum,
    transformations,
)

__all__ = [
    "architectures",
    "carried_means",
    "corrections",
    "criticality",
    "densities",
    "finite_width",
    "fixed_points",
    "linear_regime",
    "mean_field",
    "prescription",
    "shared_weights",
]
__all__ += ["spectrum", "transformations"]
