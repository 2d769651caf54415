"""Whether two samples of vectors have one joint law, and theory beside simulation."""

import itertools

import jax
import numpy as np
import scipy.stats

from gradflow import comparison, gaussian
from gradflow.simulation import monte_carlo
from gradflow.theory import float64

SLOPES = {"ordered": 0.8, "critical": 1.0, "chaotic": 1.25}  # χ₁
_LENGTH = {"logistic": 500.0, "cos": 3.0}  # q*; 1 for all others


def scales(activation, phase):
    """q, σ_w² and σ_b² with χ₁(q) as the phase says, and whether q is a fixed point.

    It is not where σ_b² would have to be negative, and q is just the first layer's.
    """
    q = _LENGTH.get(activation.name, 1.0)
    with jax.enable_x64(True):
        m = {n: float(gaussian.moment(activation, n, np.array(q))) for n in ("phi2", "dphi2")}
    sigma_w2 = SLOPES[phase] / m["dphi2"]
    sigma_b2 = q - sigma_w2 * m["phi2"]
    if abs(sigma_b2) < 1e-12:
        return q, sigma_w2, 0.0, True
    if sigma_b2 < 0:  # with biases, as other phases have: one program for all
        return q, sigma_w2, 0.0 if activation.homogeneous else 0.05, False
    return q, sigma_w2, sigma_b2, True


def compared(network, x, *, key, networks):
    """`comparison.compare`, but for χ far above the top, of which the verdict alone is made."""
    theory, corrections = float64.predict_and_correct(network, x)
    simulated = monte_carlo.simulate(network, x, key=key, networks=networks)
    found = comparison.compare_results(theory, simulated, corrections=corrections)
    return comparison.explain_differences(found, x, key=key)


def smallest_p_value(a, b):
    """The smallest p-value, times how many there are, of tests of one law of a and b.

    Both have shape (samples, features). Tested by Kolmogorov and Smirnov are each feature's own law
    and, for dependence, the law of each product of two features' normal scores (ranks in the pooled
    sample): its mean is a rank correlation. Under the null, one law, it is below p with a
    probability of at most p (Bonferroni).
    """
    ranks = scipy.stats.rankdata(np.concatenate([a, b]), axis=0)
    scores = scipy.stats.norm.ppf(ranks / (len(ranks) + 1))
    u, v = scores[: len(a)], scores[len(a) :]
    columns = range(u.shape[1])
    p = [scipy.stats.ks_2samp(u[:, i], v[:, i]).pvalue for i in columns]
    p += [
        scipy.stats.ks_2samp(u[:, i] * u[:, j], v[:, i] * v[:, j]).pvalue
        for i, j in itertools.combinations(columns, 2)
    ]
    return min(p) * len(p)
