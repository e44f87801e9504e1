"""The inference form of the production network: the same function of the same weights, cheaper and closer to float64.

`FusedTransformer(network)` is built from a trained `SE3Transformer` when a model is exported. What differs is arithmetic only:

* radial networks become cubic splines (`spline`): one weighted gather per layer;
* gains, scales and constant factors are multiplied into the linear maps beside them, and maps of the same input become one (`nodes`);
* messages are not formed: they are products with a coupling matrix of each edge (`edges`), and attention runs over portions of the
  receivers that fit in the processor's cache (`attention`).

`FusedTransformer.energy_and_gradient` is the reverse pass, written by hand: every module has beside `forward` its `adjoint`, which turns the
derivative of the energy by its result into that by its arguments. Where the edges fit in one portion it uses what `forward` made of them;
else it makes them again, portion by portion, so that memory stays linear in the number of edges with a small constant.

The tests hold values and gradients to those of the network it was built from, and every adjoint to autograd.
"""

from training.fused.network import FusedTransformer

__all__ = ["FusedTransformer"]
