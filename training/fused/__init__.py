"""The inference form of the production network: the same function of the same weights, cheaper and closer to float64.

`FusedTransformer(network)` is built from a trained `SE3Transformer` when a model is exported. What differs is arithmetic only:

* radial networks become cubic splines (`spline`): one weighted gather per layer;
* gains, scales and constant factors are multiplied into the linear maps beside them, and maps of the same input become one (`nodes`);
* attention runs over portions of the receivers that fit in the processor's cache (`attention`).

The tests hold values and gradients to those of the network it was built from.
"""

from training.fused.network import FusedTransformer, inference_form

__all__ = ["FusedTransformer", "inference_form"]
