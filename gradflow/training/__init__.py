"""Training: the weights of random networks as parameters, and how layers learn.

`initial_weights` are those of the network that `simulation.propagation.propagate` draws with the
dense sampler from the same key; `outputs` is the network with any such weights, an ordinary
function to differentiate. `train` trains many networks at once by minibatches, on the cross-entropy
of softmax(z^L), and records every layer along the way. What is recorded of a layer is what
`propagate` measures when it is given the weights of that step: there is one implementation.

Network number i of a grid point has the key ``fold_in(key, i)``, as in a simulation: before the
first step its statistics are those of the network that a simulation draws. Batches are the data in
an order drawn anew each epoch (samples that fill no batch are left out), the same one for number i
at every grid point. What happens at a step depends on the key and the step's number alone.

`parameters` are a random network's weights, `records` what is recorded at a step; `loop` has the
compiled programs, `grid` runs them for many networks, and `result` is what comes of it.
"""

from gradflow.training.loop import State
from gradflow.training.optimisers import CLIPPINGS, OPTIMISERS, clipping, optimiser, with_noise
from gradflow.training.parameters import Weights, initial_weights, outputs
from gradflow.training.records import RECORDED, activation_percentile_98
from gradflow.training.result import Training
from gradflow.training.train import train

__all__ = ["CLIPPINGS", "OPTIMISERS", "RECORDED", "State", "Training", "Weights"]
__all__ += ["activation_percentile_98", "clipping", "initial_weights", "optimiser", "outputs"]
__all__ += ["train", "with_noise"]
