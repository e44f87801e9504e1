"""The SE(3)-Transformer as the thesis writes it: every equation a few lines of plain torch, findable by its number.

The production form (`training.network.transformer`) is the same architecture made fast; this one is what it is tested against, and what the
thesis' presets train. Both take the same inputs, give the same outputs and share one trainer and one exporter.

==============  ======================  ================================================================
equation        file                    what
==============  ======================  ================================================================
equation 2.1    `basis_kernels`         basis kernels from Clebsch-Gordan constants and spherical harmonics
equation 2.2    `radial_kernels`        kernels: basis kernels weighted by learned functions of the distance
equation 2.3    `attention`             queries
equation 2.4    `attention`             keys
equation 2.5    `attention`             attention weights
equation 2.6    `self_interaction`      channels mixed by weights that belong to the atom
equation 2.7    `self_interaction`      those weights: a network of the invariant products
equation 2.8    `layer`                 the layer: self-interaction plus attended messages of several heads
equation 2.9    `norm`                  norm non-linearity
Fig. 2.1        `transformer`           the architecture
==============  ======================  ================================================================

Tensors are laid out as in the whole folder: ``(n_atoms, 2*l + 1, channels_l)`` for a feature of degree l, a list of these for a node state.
The receiver's degree is l (index a), the sender's k (index b), that of the harmonics J (index m).

Where this differs from the thesis
    * Softmax (equation 2.5): the smooth one with a sink of the production form. The plain softmax jumps whenever a neighbour crosses the
      cutoff, and an isolated atom divides 0 by 0.
    * Spherical harmonics are polynomials of x, y, z. Through angles, as the thesis' code had them, the gradient is NaN on the polar axis.
    * Norm non-linearity (equation 2.9): f / |f| is f / sqrt(|f|^2 + epsilon^2), or its gradient would be unbounded where f vanishes.
    * The sum over all J = |k - l| .. k + l is equivariant under rotations only: a cross product makes pseudo-vectors, and the energy of a
      chiral molecule may differ from that of its mirror image. ``parity: natural`` keeps the terms with l + k + J even, and with them the
      mirror symmetry, which an exported model must have.
"""

from training.network.reference.transformer import ReferenceConfig, ReferenceTransformer

__all__ = ["ReferenceConfig", "ReferenceTransformer"]
