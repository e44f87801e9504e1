"""Entry points for openmm-ml: ``MLPotential("se3", modelPath=...)`` and ``MLPotential("se3-ani1x")``.

openmm-ml loads and instantiates every registered factory while it is imported, so nothing heavy is imported at module level:
a broken torch must not break openmm-ml for users of other potentials.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory

if TYPE_CHECKING:
    import openmm

    from openmm_se3.potential import SE3Potential


class SE3PotentialImplFactory(MLPotentialImplFactory):
    """Makes the implementation for the name ``se3`` and for the name of every released model."""

    def createImpl(self, name: str, modelPath: str | None = None, potential: SE3Potential | None = None, **args: Any) -> MLPotentialImpl:
        """Called by ``MLPotential(name, **args)``.

        Parameters
        ----------
        name : str
            ``se3`` or the name of a released model.
        modelPath : str, optional
            Path of an exported model, needed for ``se3``.
        potential : SE3Potential, optional
            A potential that is already loaded, instead of `modelPath`.
        **args
            ``forces``, ``device`` and ``precision`` of `SE3Potential`.

        Raises
        ------
        ValueError
            If ``se3`` comes without `modelPath`.
        """
        if name == "se3" and modelPath is None and potential is None:
            raise ValueError("MLPotential('se3') needs modelPath='model.pt', an exported model; released models go by their names")
        return SE3PotentialImpl({"model": modelPath if modelPath is not None else name, **args}, potential)


class SE3PotentialImpl(MLPotentialImpl):
    """Adds an `SE3Potential` to the Systems that openmm-ml makes.

    Parameters
    ----------
    options : dict
        Arguments of `SE3Potential`; the model is loaded when forces are first added.
    potential : SE3Potential, optional
        Use this one instead.
    """

    def __init__(self, options: dict[str, Any], potential: SE3Potential | None = None) -> None:
        super().__init__()
        self._options = options
        self._potential = potential

    def addForces(self, topology: openmm.app.Topology, system: openmm.System, atoms: Iterable[int] | None, forceGroup: int, **args: Any) -> None:
        """Called by ``MLPotential.createSystem`` and ``createMixedSystem``; `args` meant for others are ignored."""
        if self._potential is None:
            from openmm_se3.potential import SE3Potential

            given = {k: args[k] for k in ("forces", "device", "precision") if k in args}
            self._potential = SE3Potential(**(self._options | given))
        self._potential.addForces(topology, system, None if atoms is None else list(atoms), forceGroup)

    def getMLLongRange(self) -> bool:
        """The model has a cutoff, so openmm-ml keeps the classical long-range terms as they are."""
        return False
