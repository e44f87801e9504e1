"""Which versions of OpenMM, torch and openmm-torch are installed, and whether they fit each other; imports none of them."""

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version

from packaging.requirements import Requirement
from packaging.version import Version

#: What to do about an openmm-torch that is missing or does not fit.
MEND = (
    "Install exactly one build of openmm-torch that fits: pip install 'openmm-se3[cpu]' (or [cuda12], [cuda13]), "
    "or conda install -c conda-forge openmm-torch."
)


def installed_version(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def openmmtorch_builds() -> list[Distribution]:
    """Distributions that bring the module ``openmmtorch``; more than one overwrite each other."""
    found = {}
    for distribution in distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if "openmmtorch" in name or name.startswith("openmm-torch"):
            # A package without code may bring another one only.
            files = distribution.files
            if files is None or any(f.name == "openmmtorch.py" for f in files):
                found[name] = distribution
    return [found[name] for name in sorted(found)]


def openmmtorch_mismatch() -> str | None:
    """What the installed packages say of each other: the pair that does not fit, or None.

    Returns
    -------
    str or None
        A sentence without a full stop.
    """
    if sys.version_info >= (3, 14):
        return f"TorchScript is not supported on Python {sys.version_info.major}.{sys.version_info.minor}"
    builds = openmmtorch_builds()
    if len(builds) > 1:
        return "more than one build of openmm-torch is installed, each overwriting the other: " + ", ".join(f"{d.name} {d.version}" for d in builds)
    for build in builds:
        for text in build.requires or []:
            requirement = Requirement(text)
            if requirement.name not in ("torch", "openmm") or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            present = installed_version(requirement.name)
            if present is not None and not requirement.specifier.contains(Version(present).base_version, prereleases=True):
                return f"{build.name} {build.version} needs {requirement.name} {requirement.specifier}, but {requirement.name} {present} is installed"
    return None


def serialisation_mismatch() -> str | None:
    """Whether reading a serialised TorchForce crashes the process, by the versions installed.

    OpenMM 8.6 changed how `SerializationNode` returns its properties; builds of openmm-torch for OpenMM 8.5 (the wheels up to
    1.10) then crash in ``XmlSerializer.deserialize``, ``XmlSerializer.clone``, ``copy.deepcopy`` and inside a CustomCVForce.

    Returns
    -------
    str or None
        A sentence without a full stop.
    """
    openmm = installed_version("openmm")
    for build in openmmtorch_builds():
        if (
            openmm is not None
            and Version(openmm) >= Version("8.6")
            and build.name.startswith("acellera")
            and Version(build.version) <= Version("1.10")
        ):
            return (
                f"{build.name} {build.version} was built for OpenMM 8.5 and crashes the process when OpenMM {openmm} reads or copies a serialised "
                "TorchForce (System XML, copy.deepcopy, CustomCVForce)"
            )
    return None
