"""Which platforms this OpenMM has."""

import openmm


def platform_names() -> list[str]:
    """Names of the platforms whose libraries could be loaded."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
