"""Read and copy a System with a TorchForce in it where openmm-torch itself would crash the process."""

import copyreg
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from xml.etree import ElementTree

import openmm

from openmm_se3.installation import serialisation_mismatch

_TORCH_FORCE = "TorchForce"
#: Version of TorchForce's XML that the builds this module stands in for write; older ones lack parts that have defaults.
_NEWEST_VERSION = 4
#: Classes that hold other forces, which OpenMM copies inside a Context, with the method that adds one.
_CONTAINERS = (("CustomCVForce", "addCollectiveVariable"), ("ATMForce", "addForce"))
_mended = False


def mend_serialisation() -> bool:
    """Let ``XmlSerializer.deserialize``, ``XmlSerializer.clone``, ``copy`` and ``pickle`` handle a TorchForce instead of crashing the process.

    Only for the pairs of OpenMM and openmm-torch that `openmm_se3.installation.serialisation_mismatch` names; with all others nothing
    changes. There, openmm-torch's own reader is never called: the force is made anew from the XML, which is the same as ever, and all
    else is read by OpenMM. A TorchForce inside a CustomCVForce or an ATMForce, which OpenMM copies where Python cannot reach, is
    refused when it is put there.

    Called whenever this package makes a TorchForce; call it in a script that only reads a System.

    Returns
    -------
    bool
        Whether anything had to be mended, now or before.

    Examples
    --------
    >>> import openmm_se3
    >>> mended = openmm_se3.mend_serialisation()
    >>> system = openmm.XmlSerializer.deserialize(open("system.xml").read())  # doctest: +SKIP
    """
    global _mended
    if not _mended and serialisation_mismatch() is not None:
        serializer = openmm.XmlSerializer
        serializer.deserializeSystem = staticmethod(_deserialize_system(serializer.deserializeSystem, serializer._deserializeForce))
        serializer._cloneSystem = staticmethod(_clone(serializer._cloneSystem, serializer.deserializeSystem, openmm.System.getForces))
        copyreg.pickle(openmm.System, _reduce_system)
        openmm.System.__copy__ = _clone(openmm.System.__copy__, serializer.deserializeSystem, openmm.System.getForces)
        serializer._deserializeForce = staticmethod(_deserialize_force(serializer._deserializeForce))
        serializer._cloneForce = staticmethod(_clone(serializer._cloneForce, serializer._deserializeForce, lambda force: [force]))
        for name, method in _CONTAINERS:
            container = getattr(openmm, name)
            setattr(container, method, _refuse_torch_force(getattr(container, method), name))
        _mended = True
    return _mended


def _reduce_system(system: openmm.System) -> tuple[Callable[[str], openmm.System], tuple[str]]:
    return _read_system, (openmm.XmlSerializer.serialize(system),)


def _read_system(text: str) -> openmm.System:
    """What `pickle` calls: also in another process, such as a worker of `multiprocessing`, where nobody has mended anything yet."""
    mend_serialisation()
    return openmm.XmlSerializer.deserialize(text)


def _is_torch_force(force: openmm.Force) -> bool:
    # Where openmmtorch is not imported there is no TorchForce, and it may not be importable.
    openmmtorch = sys.modules.get("openmmtorch")
    return openmmtorch is not None and bool(openmmtorch.TorchForce.isinstance(force))


def _mentioned(text: str) -> bool:
    return f'type="{_TORCH_FORCE}"' in text


def _deserialize_system(plain: Callable[[str], openmm.System], plain_force: Callable[[str], openmm.Force]) -> Callable[[str], openmm.System]:
    def deserialize(text: str) -> openmm.System:
        if not _mentioned(text):
            return plain(text)
        root = ElementTree.fromstring(text)
        parent = root.find("Forces")
        assert parent is not None, "a System's XML has Forces, in which one was mentioned"
        forces = list(parent)
        first = next((i for i, force in enumerate(forces) if force.get("type") == _TORCH_FORCE), len(forces))
        # From the first TorchForce on they are read one by one, so that all keep their places.
        for force in forces[first:]:
            parent.remove(force)
        _check_nested(root)
        system = plain(ElementTree.tostring(root, encoding="unicode"))
        for force in forces[first:]:
            system.addForce(_read_force(force, plain_force))
        return system

    return deserialize


def _deserialize_force(plain: Callable[[str], openmm.Force]) -> Callable[[str], openmm.Force]:
    def deserialize(text: str) -> openmm.Force:
        return _read_force(ElementTree.fromstring(text), plain) if _mentioned(text) else plain(text)

    return deserialize


def _clone(
    plain: Callable[[Any], Any], deserialize: Callable[[str], Any], forces_of: Callable[[Any], Iterable[openmm.Force]]
) -> Callable[[Any], Any]:
    def clone(original: Any) -> Any:
        if not any(_is_torch_force(force) for force in forces_of(original)):
            return plain(original)
        copied = deserialize(openmm.XmlSerializer.serialize(original))
        # The XML of a TorchForce lacks its name.
        for old, new in zip(forces_of(original), forces_of(copied), strict=True):
            new.setName(old.getName())
        return copied

    return clone


def _refuse_torch_force(add: Callable[..., Any], container: str) -> Callable[..., Any]:
    @wraps(add)
    def checked(self: openmm.Force, *args: Any, **kwargs: Any) -> Any:
        for force in (*args, *kwargs.values()):
            if isinstance(force, openmm.Force) and _is_torch_force(force):
                raise openmm.OpenMMException(_message(container))
        return add(self, *args, **kwargs)

    return checked


def _message(container: str) -> str:
    return (
        f"a TorchForce cannot be inside a {container} here: {serialisation_mismatch()}. To scale the model use scaleParameter, to mix it with a "
        "force field createMixedSystem(interpolate=True): neither needs a container"
    )


def _check_nested(element: ElementTree.Element) -> None:
    """Refuse a TorchForce below another force."""
    for force in element.iter("Force"):
        if any(inner is not force and inner.get("type") == _TORCH_FORCE for inner in force.iter()):
            raise openmm.OpenMMException(_message(force.get("type", "Force")))


def _read_force(element: ElementTree.Element, plain: Callable[[str], openmm.Force]) -> openmm.Force:
    """A force from its XML: a TorchForce here, any other by OpenMM."""
    if element.get("type") != _TORCH_FORCE:
        _check_nested(element)
        return plain(ElementTree.tostring(element, encoding="unicode"))
    from openmmtorch import TorchForce

    from openmm_se3.model_file import module_from_bytes

    version, archive = int(element.get("version", "0")), element.get("encodedFileContents")
    if version > _NEWEST_VERSION or archive is None:
        raise openmm.OpenMMException(f"a TorchForce of version {version} cannot be read; versions up to {_NEWEST_VERSION} with the module inside can")
    force = TorchForce(module_from_bytes(bytes.fromhex(archive)))
    force.setForceGroup(int(element.get("forceGroup", "0")))
    force.setUsesPeriodicBoundaryConditions(element.get("usesPeriodic") == "1")
    force.setOutputsForces(element.get("outputsForces") == "1")
    for parameter in element.iterfind("GlobalParameters/Parameter"):
        force.addGlobalParameter(parameter.attrib["name"], float(parameter.attrib["default"]))
    for derivative in element.iterfind("ParameterDerivatives/Parameter"):
        force.addEnergyParameterDerivative(derivative.attrib["name"])
    for item in element.iterfind("Properties/Property"):
        force.setProperty(item.attrib["name"], item.attrib["value"])
    return force
