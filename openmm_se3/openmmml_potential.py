"""What openmm-ml calls to put the model into a System."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from openmmml.mlpotential import MLPotentialImpl

if TYPE_CHECKING:
    import openmm

    from openmm_se3.potential import SE3Potential


#: Arguments of `SE3Potential` that one call may choose.
_OF_POTENTIAL = ("forces", "device", "precision", "max_neighbors", "cuda_graphs", "inner_steps")
#: Forces whose interactions openmm-ml has no way to leave out between the model's own atoms.
_CANNOT_LEAVE_OUT = (
    "AmoebaMultipoleForce",
    "AmoebaVdwForce",
    "CustomHbondForce",
    "CustomManyParticleForce",
    "GayBerneForce",
    "HippoNonbondedForce",
)
#: What else is heeded here or by openmm-ml's embedding.
_OF_CALL = ("forceGroup", "scaleParameter", "batch", "charge", "multiplicity", "linkAtomDistances")


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
        self._given = potential
        self._loaded: dict[tuple[tuple[str, Any], ...], SE3Potential] = {}
        self._interpolated: list[openmm.Force] | None = None
        self._classical: openmm.System | None = None
        self._sites: frozenset[int] = frozenset()

    def addForces(self, topology: openmm.app.Topology, system: openmm.System, atoms: Iterable[int] | None, forceGroup: int, **args: Any) -> None:
        """Called by ``MLPotential.createSystem`` and ``createMixedSystem``.

        `args` may hold ``forces``, ``device``, ``precision``, ``max_neighbors``, ``cuda_graphs`` and ``inner_steps`` of `SE3Potential`, for this
        call, and ``forceGroup``, ``scaleParameter`` and ``batch`` of `SE3Potential.addForces`.

        Warns
        -----
        UserWarning
            If it holds others, which may be meant for another potential.

        Raises
        ------
        UnsupportedSystemError
            If `args` holds a ``charge`` that is not 0 or a ``multiplicity`` that is not 1, or as `SE3Potential.addForces`.
        ValueError
            If it holds another option than the potential that was given has, or ``hydrogenMass``.
        """
        from openmm_se3.checks import check_neutral

        check_neutral(args.get("charge"), args.get("multiplicity"))
        if args.get("hydrogenMass") is not None:
            raise ValueError(
                "openmm-ml makes the System here, which knows no hydrogenMass; take SE3Potential(...).createSystem(topology, hydrogenMass=...), or "
                "openmm_se3.masses.repartition_hydrogen_mass(topology, system, mass) afterwards"
            )
        if unknown := sorted(set(args) - {*_OF_POTENTIAL, *_OF_CALL, "hydrogenMass"}):
            warnings.warn(f"{', '.join(unknown)}: no option of this potential, and without effect", stacklevel=4)
        potential = self._potential({k: args[k] for k in _OF_POTENTIAL if k in args})
        chosen = None if atoms is None else [atom for atom in atoms if atom not in self._sites]
        made = potential._makeForces(
            topology, system, chosen, args.get("forceGroup", forceGroup), args.get("scaleParameter"), args.get("batch"), self._classical
        )
        if self._interpolated is not None:
            self._interpolated.extend(made)
        else:
            for force in made:
                system.addForce(force)

    def _potential(self, given: dict[str, Any]) -> SE3Potential:
        """The potential with these options besides those of the beginning, loaded at its first call."""
        if self._given is not None:
            for name, value in given.items():
                if getattr(self._given, name) != value:
                    raise ValueError(f"{name}={value!r} was asked for, but the potential that was given has {getattr(self._given, name)!r}")
            return self._given
        key = tuple(sorted(given.items()))
        if key not in self._loaded:
            from openmm_se3.potential import SE3Potential

            self._loaded[key] = SE3Potential(**(self._options | given))
        return self._loaded[key]

    def getMLLongRange(self) -> bool:
        """The model has a cutoff, so openmm-ml keeps the classical long-range terms as they are."""
        return False

    def getSupportedEmbeddings(self) -> list[str]:
        """Mechanical embedding is openmm-ml's own, called by `createMixedSystem`."""
        return ["mechanical"]

    def createMixedSystem(
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: list[int],
        forceGroup: int,
        interpolate: bool,
        embedding: str,
        returnInfo: bool = False,
        **args: Any,
    ) -> openmm.System | dict[str, Any]:
        """Mechanical embedding by openmm-ml, except that an interpolated model scales itself.

        openmm-ml would put the model's forces into its CustomCVForce: one force group for all of them, an inner Context for each
        step, and copies by serialisation, which crash the process where openmm-torch was built for another OpenMM (8.5 and 8.6
        differ). A global parameter of the same name in the forces themselves gives the same energies and forces.

        Bonds between `atoms` and others are capped by hydrogens on virtual sites, which the model describes too and which are appended
        to the System; ``returnInfo=True`` returns their topology. Virtual sites that `atoms` alone carry, such as the fourth of TIP4P water, lose
        their classical interactions with `atoms` and each other, as `atoms` do.

        Raises
        ------
        UnsupportedSystemError
            If `atoms` holds virtual sites, which have no element, or Drude particles hang on them; if a polarisable or another classical force
            would go on to act between them, or an implicit solvent has no place for the caps of cut bonds; or if topology and System disagree.
        ValueError
            If the potential has ``inner_steps``, with which its forces would have to be alone at the inner steps, or multiple time steps and a
            `forceGroup` other than 0, which the classical forces are in.

        Warns
        -----
        UserWarning
            For multiple time steps of a System with virtual sites, caps of cut bonds among them, which only GPU platforms integrate correctly; and
            where `interpolate` ends at a force field whose bonds are constraints.
        """
        from openmmml.embeddings.mechanicalembedding import MechanicalEmbedding

        from openmm_se3.binding import MULTIPLE_TIME_STEPS
        from openmm_se3.errors import UnsupportedSystemError
        from openmm_se3.force import require_same_particles, warn_of_virtual_sites

        require_same_particles(topology, system)
        inner_steps = args.get("inner_steps", self._options.get("inner_steps") if self._given is None else self._given.inner_steps)
        if inner_steps is not None:
            raise ValueError(
                f"inner_steps={inner_steps} is for Systems that the model drives alone, but here classical forces act at the inner steps too: "
                "leave it out, and fastInSlow of MultipleTimeStepIntegrator"
            )
        forces = args.get("forces", self._options.get("forces") if self._given is None else self._given.forces)
        if forces in MULTIPLE_TIME_STEPS and args.get("forceGroup", forceGroup) != 0:
            raise ValueError(
                f"with forces={forces!r} forceGroup must be 0, got {args.get('forceGroup', forceGroup)}: the classical forces are in group 0, and "
                "belong to the inner steps as the first of the model's forces does"
            )
        sites = [a.index for a in topology.atoms() if a.element is None]
        if set(sites) & set(atoms):
            raise UnsupportedSystemError(f"atoms {sorted(set(sites) & set(atoms))[:5]} have no element (virtual sites); leave them out of atoms")
        _refuse_drude_particles(system, set(atoms))
        _refuse_what_cannot_be_left_out(system, set(atoms))
        if interpolate:
            _warn_of_bonds_without_strength(system, set(atoms))
            self._interpolated, self._classical = [], system
        self._sites = frozenset(_sites_of(system, topology.getNumAtoms(), set(atoms)))
        try:
            complete = _with_elements(topology) if sites else topology
            members = [*atoms, *sorted(self._sites)]
            made = MechanicalEmbedding().createMixedSystem(self, complete, system, members, forceGroup, interpolate, returnInfo=returnInfo, **args)
            mixed = made["system"] if isinstance(made, dict) else made
            if mixed.getNumParticles() > system.getNumParticles():
                _refuse_caps_in_implicit_solvent(mixed)
            for force in self._interpolated or []:
                mixed.addForce(force)
            if isinstance(made, dict):
                everything = list(made["topology"].atoms())
                for site in sites:
                    everything[made["oldToNew"][site]].element = None
            if forces in MULTIPLE_TIME_STEPS:
                warn_of_virtual_sites(mixed)
        finally:
            self._interpolated, self._classical, self._sites = None, None, frozenset()
        return made


def _sites_of(system: openmm.System, n_atoms: int, atoms: set[int]) -> list[int]:
    """Virtual sites of the topology whose places follow from those of `atoms` alone; not the caps of an earlier mixed System, which come after."""
    found: list[int] = []
    known = set(atoms)
    for index in range(n_atoms):
        if system.isVirtualSite(index) and index not in known:
            site = system.getVirtualSite(index)
            if {site.getParticle(i) for i in range(site.getNumParticles())} <= known:
                found.append(index)
                known.add(index)
    return found


def _refuse_drude_particles(system: openmm.System, atoms: set[int]) -> None:
    """The charges on springs of a polarisable force field would go on to interact with those of the other atoms of the model."""
    import openmm

    from openmm_se3.errors import UnsupportedSystemError

    for force in system.getForces():
        if isinstance(force, openmm.DrudeForce):
            parents = {force.getParticleParameters(i)[1] for i in range(force.getNumParticles())}
            if parents & atoms:
                raise UnsupportedSystemError(
                    f"atoms {sorted(parents & atoms)[:5]} have Drude particles, which would go on to polarise each other classically beside the "
                    "model; take a force field without them for these atoms"
                )


def _refuse_what_cannot_be_left_out(system: openmm.System, atoms: set[int]) -> None:
    """Energies of the model's own atoms would be counted twice, by the model and by the force field."""
    from openmm_se3.errors import UnsupportedSystemError

    kept = sorted({type(force).__name__ for force in system.getForces()} & set(_CANNOT_LEAVE_OUT))
    if kept and len(atoms) > 1:
        raise UnsupportedSystemError(
            f"{', '.join(kept)} would go on to act between the atoms of the model, besides the model; take a force field of NonbondedForce and "
            "CustomNonbondedForce, such as amber14, for the rest"
        )


def _refuse_caps_in_implicit_solvent(mixed: openmm.System) -> None:
    """OpenMM wants every particle in these forces, and openmm-ml does not add the caps to them."""
    import openmm

    from openmm_se3.errors import UnsupportedSystemError

    if any(isinstance(force, (openmm.CustomGBForce, openmm.GBSAOBCForce)) for force in mixed.getForces()):
        raise UnsupportedSystemError(
            "atoms ends at bonds, which hydrogens cap, and the implicit solvent of the System has no parameters for those; choose atoms that cut "
            "no bond, or take explicit solvent or none"
        )


def _warn_of_bonds_without_strength(system: openmm.System, atoms: set[int]) -> None:
    """A force field with constraints has no terms for those bonds, and openmm-ml removes the constraints."""
    import openmm

    with_strength = set()
    for force in system.getForces():
        if isinstance(force, (openmm.HarmonicBondForce, openmm.CustomBondForce)):
            with_strength |= {frozenset(force.getBondParameters(i)[:2]) for i in range(force.getNumBonds())}
    constrained = [system.getConstraintParameters(i)[:2] for i in range(system.getNumConstraints())]
    loose = [pair for pair in constrained if set(pair) <= atoms and frozenset(pair) not in with_strength]
    if loose:
        warnings.warn(
            f"{len(loose)} bonds between atoms of the model are constraints in the classical System, the first that of atoms {loose[0][0]} and "
            f"{loose[0][1]}, which openmm-ml removes: at lambda_interpolate=0 nothing holds them. Make that System with constraints=None and "
            "rigidWater=False, or with flexibleConstraints=True; with removeConstraints=False take no notice of this",
            stacklevel=4,
        )


def _with_elements(topology: openmm.app.Topology) -> openmm.app.Topology:
    """A copy whose virtual sites, such as those of TIP4P water, pass for hydrogen: openmm-ml 1.8 asks every atom for its atomic number."""
    from openmm import app

    copied = copy.deepcopy(topology)
    for atom in copied.atoms():
        if atom.element is None:
            atom.element = app.element.hydrogen
    return copied
