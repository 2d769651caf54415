"""Whether two samples of vectors have one joint law."""

import itertools

import numpy as np
import scipy.stats


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
