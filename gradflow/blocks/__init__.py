"""Blocks: the repeating unit of a network, defined once and read twice.

`apply` is one random network acting on its signals; `kernel` is the same block at infinite width,
acting on their second moments (`gradflow.kernels.Kernel`). Both multiply by weights through a
``multiply`` that they are given: a sampler's in a simulation, `kernels.multiply_kernel` in theory.
Nothing backward is written by hand: in a simulation gradients come from `jax.vjp` of ``apply``; in
theory from the transpose of the map that ``kernel`` is on the second moments of a tangent.

The signal that a block hands on is the pre-activation z of its layer, so that a chain of `Dense`
blocks is z^l = W^l φ(z^{l-1}) + b^l. Blocks nest: ``Residual(Chain((LayerNorm(), Dense())))``.

base
    The definition of a block.
dense
    `Linear` W h + b, `Activate` φ(z), and `Dense` W φ(z) + b.
convolution
    `Convolution` W * φ(z), with strides, dilation, groups and transposed, and the `Patches` that
    its filter multiplies.
pooling
    `AveragePool` and `MaxPool` over windows of positions; `GlobalMean` and `Flatten` over all;
    `Upsample`.
embedding
    `Embedding`, a row for each token and each place.
attention
    `Attention`, which mixes an input's tokens.
composition
    `Chain` and `Residual`.
paths
    `Concatenate` and `Sum`, of blocks that all get one signal.
normalisation
    `LayerNorm`, `RMSNorm` and `GroupNorm`; `UnitVariance`, of LSUV.
gating
    `Gated`, as gated linear units are, and `Maxout`.
batch_norm
    `BatchNorm`, which mixes inputs' gradients; with convolutions its batch is over positions too.
    `InstanceNorm`, over an input's positions alone.
dropout
    `Dropout`.
recurrent
    `Drive`, an input that is new at every time step, `GRU` and `LSTM`.

To add a block, write one class in one of these files, with a default for every field, and name it
in the file's ``__all__``: `ALL` and the shared law tests find it. A new file has one line below.
"""

import inspect

from gradflow.blocks.attention import *
from gradflow.blocks.base import *
from gradflow.blocks.batch_norm import *
from gradflow.blocks.composition import *
from gradflow.blocks.convolution import *
from gradflow.blocks.dense import *
from gradflow.blocks.dropout import *
from gradflow.blocks.embedding import *
from gradflow.blocks.gating import *
from gradflow.blocks.normalisation import *
from gradflow.blocks.paths import *
from gradflow.blocks.pooling import *
from gradflow.blocks.recurrent import *

ALL = tuple(
    block
    for block in list(vars().values())
    if inspect.isclass(block) and issubclass(block, AbstractBlock) and not inspect.isabstract(block)
)
