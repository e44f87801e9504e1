"""The two forms of the network behind one name: what a configuration can hold, and how it becomes a module."""

from training.network.reference import ReferenceConfig, ReferenceTransformer
from training.network.transformer import NetworkConfig, SE3Transformer

AnyNetworkConfig = NetworkConfig | ReferenceConfig
AnyNetwork = SE3Transformer | ReferenceTransformer


def build_network(config: AnyNetworkConfig, atomic_numbers: tuple[int, ...]) -> AnyNetwork:
    """The network that `config` describes, with random weights; `atomic_numbers` in the order of ``config.elements``."""
    if isinstance(config, ReferenceConfig):
        return ReferenceTransformer(config, atomic_numbers)
    return SE3Transformer(config, atomic_numbers)
