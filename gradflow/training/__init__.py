"""Training: the weights of random networks as parameters, and how layers learn.

`initial_weights` gives the weights of the network that `simulation.propagation.propagate` draws
with the dense sampler from the same key; `outputs` is the network with any such weights, an
ordinary function to differentiate. `train` trains many networks at once by minibatches, on the
cross-entropy of softmax(z^L), and records every layer along the way. The records of a layer are
what `propagate` measures when it is given the weights of that step: there is one implementation.

Network number i of a grid point has the key ``fold_in(key, i)``, as in a simulation: before the
first step its statistics are those of the network that a simulation draws. Batches are the data in
an order drawn anew each epoch (samples that fill no batch are left out), the same order for number
i at every grid point. All random numbers of a step depend on the key and the step's number alone.

`train` and `result` have the calls for users, `optimisers` the names of optax's optimisers. Behind
them, `_parameters` has a random network's weights, `_records` what is recorded at a step, `_loop`
the compiled programs, and `_execution` runs them for many networks.
"""

from gradflow.training._loop import State
from gradflow.training._parameters import Weights, initial_weights, outputs
from gradflow.training._records import RECORDED, Recording, activation_percentile_98
from gradflow.training.optimisers import CLIPPINGS, OPTIMISERS, clipping, optimiser, with_noise
from gradflow.training.result import Training
from gradflow.training.train import train

__all__ = ["CLIPPINGS", "OPTIMISERS", "RECORDED", "Recording", "State", "Training", "Weights"]
__all__ += ["activation_percentile_98", "clipping", "initial_weights", "optimiser", "outputs"]
__all__ += ["train", "with_noise"]
