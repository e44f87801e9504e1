"""Entry points for openmm-ml: ``MLPotential("se3", modelPath=...)`` and ``MLPotential("se3-ani1x")``.

openmm-ml loads and instantiates every registered factory while it is imported, so nothing is imported here: a broken torch must not
break openmm-ml for users of other potentials, and whichever of the two modules is imported first finds the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_se3.openmmml_potential import SE3PotentialImpl
    from openmm_se3.potential import SE3Potential


class SE3PotentialImplFactory:
    """Makes the implementation for the name ``se3`` and for the name of every released model.

    An ``openmmml.mlpotential.MLPotentialImplFactory`` by its method, without importing that base class.
    """

    def createImpl(self, name: str, modelPath: str | None = None, potential: SE3Potential | None = None, **args: Any) -> SE3PotentialImpl:
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
        from openmm_se3.openmmml_potential import SE3PotentialImpl

        return SE3PotentialImpl({"model": modelPath if modelPath is not None else name, **args}, potential)
