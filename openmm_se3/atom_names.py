"""How messages name atoms: by index and element, a few of them."""

from collections.abc import Iterable, Sequence

from openmm import app


def atom_names(topology: app.Topology, atoms: Iterable[int]) -> list[str]:
    """Names such as ``4 (H)``; of a site without an element, its name in the topology."""
    everything = list(topology.atoms())
    return [f"{i} ({everything[i].element.symbol if everything[i].element is not None else everything[i].name})" for i in atoms]


def listed(names: Sequence[str]) -> str:
    """The first five, and how many more."""
    return f"atoms {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
