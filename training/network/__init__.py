"""The SE(3)-Transformer: every file holds one concept, plain scriptable torch.

Conventions, written once for the whole folder
    * A feature of degree ``l`` is a tensor ``(n_atoms, 2*l + 1, channels_l)``: components before channels, so that a
      linear map over channels is a plain matrix product. A node state is a list of these, one per degree.
    * Components follow e3nn: degree 1 is (x, y, z); degree 2 is (xz, xy, 2yy-xx-zz, yz, zz-xx) with orthonormal
      symmetric traceless basis matrices (`geometry.DEGREE_TWO_BASIS`). Parity is natural: (-1)**l.
    * The receiver is atom i (rows), the sender is neighbour j (columns): displacement[i, k] = x_j - x_i.
    * A padded neighbour slot has mask False, index 0 and a harmless displacement; it never reaches a result.
    * Lengths are in Angstrom, energies in eV.

Two forms share one interface: `SE3Transformer`, the fast one that released models use, in this folder, and `ReferenceTransformer`, the
equations of the thesis word by word, in ``reference``.
"""

from training.network.forms import AnyNetwork, AnyNetworkConfig, build_network
from training.network.reference import ReferenceConfig, ReferenceTransformer
from training.network.transformer import NetworkConfig, SE3Transformer

__all__ = ["AnyNetwork", "AnyNetworkConfig", "NetworkConfig", "ReferenceConfig", "ReferenceTransformer", "SE3Transformer", "build_network"]
