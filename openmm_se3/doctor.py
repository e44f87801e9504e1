"""Look at an installation: versions, a force evaluation on every platform, and what does not fit with the command that mends it."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from openmm_se3.installation import MEND, installed_version, openmmtorch_builds, openmmtorch_mismatch, serialisation_mismatch

#: Largest error of a force that counts as working, kJ/mol/nm: single precision on a GPU is well below it.
FORCE_LIMIT = 1.0


@dataclass(frozen=True)
class Evaluation:
    """A force evaluation, made in a process of its own, since a wrong pair of binaries may crash it.

    Attributes
    ----------
    platform, backend : str
        Where, and through which OpenMM Force.
    force_error : float or None
        Largest difference from the forces in the model file, kJ/mol/nm; None where it failed.
    milliseconds : float or None
        For one evaluation, after a few.
    error : str
        What failed.
    """

    platform: str
    backend: str
    force_error: float | None
    milliseconds: float | None
    error: str

    @property
    def works(self) -> bool:
        """Whether the forces are right."""
        return self.force_error is not None and self.force_error <= FORCE_LIMIT


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Attributes
    ----------
    text, mend : str
        What it is, naming the packages, and what to do.
    """

    text: str
    mend: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    versions : dict
        Part of the installation to its version, or to ``not installed``.
    evaluations : list of Evaluation
        One for each platform and backend.
    problems : list of Problem
        Empty where all is well.
    """

    versions: dict[str, str]
    evaluations: list[Evaluation]
    problems: list[Problem]

    @property
    def works(self) -> bool:
        """Whether at least one platform gives right forces."""
        return any(e.works for e in self.evaluations)


def _driver() -> str | None:
    """Version of the NVIDIA driver and names of the GPUs, None without them."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return "; ".join(result.stdout.strip().splitlines()) if result.returncode == 0 and result.stdout.strip() else None


def _evaluate_in_new_process(platform: str) -> list[Evaluation]:
    command = [sys.executable, "-W", "ignore", "-m", "openmm_se3.doctor", platform]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        output, status = result.stdout, f"the process ended with status {result.returncode}"
    except subprocess.TimeoutExpired:
        output, status = "", "no answer within 300 s"
    done = [Evaluation(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    missing = [b for b in ("PythonForce", "TorchForce") if b not in {e.backend for e in done}]
    return done + [Evaluation(platform, backend, None, None, status) for backend in missing]


def _evaluate(platform: str, backend: str) -> Evaluation:
    """Direct forces of a golden structure of the default model, compared with those in its file."""
    import time

    import numpy as np
    import openmm
    from openmm import unit

    from openmm_se3.force import create_forces, torch_force_problem
    from openmm_se3.model_file import available_models, load_model

    try:
        problem = torch_force_problem() if backend == "TorchForce" else None
        if problem is not None:
            return Evaluation(platform, backend, None, None, problem)
        model = load_model("se3-ani1x" if "se3-ani1x" in available_models() else available_models()[0])
        golden = next(g for g in model.metadata.golden if g.box_vectors_nm is None)
        n = len(golden.atomic_numbers)
        system = openmm.System()
        for _ in range(n):
            system.addParticle(1.0)
        for force in create_forces(model, model.metadata, golden.atomic_numbers, range(n), n, False, "direct", 0, backend=backend):
            system.addForce(force)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
        for _ in range(5):  # TorchScript optimises during the first calls
            begin = time.perf_counter()
            context.setPositions(np.array(golden.positions_nm))
            forces = context.getState(getForces=True).getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
            elapsed = 1e3 * (time.perf_counter() - begin)
        error = float(np.abs(forces - np.array(golden.forces)).max())
        return Evaluation(platform, backend, error, elapsed, "" if error <= FORCE_LIMIT else "wrong forces")
    except Exception as error:  # whatever it is, it is what the user has to know
        return Evaluation(
            platform, backend, None, None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        )


def _problems(driver: str | None, cuda: str | None, sees_gpu: bool, platforms: list[str], evaluations: list[Evaluation]) -> list[Problem]:
    found = []
    extra = f"cuda{cuda.split('.')[0]}" if cuda is not None and driver is not None else "cpu"
    install = f"pip install 'openmm-se3[{extra}]', or conda install -c conda-forge openmm-torch"
    builds = openmmtorch_builds()
    mismatch = openmmtorch_mismatch()
    if mismatch is not None:
        wanted = next((r for b in builds for r in b.requires or [] if r.startswith("torch")), None)
        if len(builds) > 1:
            removed = " ".join(b.name for b in builds)
            found.append(Problem(mismatch, f"pip uninstall {removed}, then {install}"))
        else:
            found.append(Problem(mismatch, f"pip install '{wanted}'" if wanted is not None and "torch" in mismatch else MEND))
    elif not builds and not any(e.works and e.backend == "TorchForce" for e in evaluations):
        found.append(Problem("openmm-torch is not installed; the model runs through openmm.PythonForce, which is slower", install))
    elif not any(e.works and e.backend == "TorchForce" for e in evaluations):
        reason = next((e.error for e in evaluations if e.backend == "TorchForce"), "")
        found.append(Problem(f"openmm-torch is installed, but TorchForce works on no platform ({reason})", install))
    serialisation = serialisation_mismatch()
    if serialisation is not None:
        found.append(
            Problem(
                serialisation,
                "nothing in scripts that make the force by this package; in one that only reads a System call openmm_se3.mend_serialisation() "
                "first; where this package is not to be installed, pip install 'openmm>=8.5.2,<8.6' (without openmm-ml, which needs 8.6.1)",
            )
        )
    for build in builds:
        cuda_of_build = build.name.rsplit("cu", 1)[-1] if build.name.rsplit("cu", 1)[-1].isdigit() else None
        if cuda_of_build is not None and (cuda is None or cuda.split(".")[0] != cuda_of_build):
            found.append(
                Problem(
                    f"{build.name} is for CUDA {cuda_of_build}, but torch was built for CUDA {cuda}", f"pip uninstall {build.name}, then {install}"
                )
            )
    if driver is not None and cuda is not None and not sees_gpu:
        found.append(
            Problem(
                f"there is an NVIDIA driver ({driver}), but torch, built for CUDA {cuda}, sees no GPU",
                "update the driver, or install torch for its CUDA",
            )
        )
    if driver is not None and sees_gpu and "CUDA" not in platforms:
        found.append(Problem("torch sees a GPU, but OpenMM has no CUDA platform", f"pip install 'openmm[{extra}]'"))
    return found


def diagnose() -> Diagnosis:
    """Look at versions, platforms and what does not fit; evaluate forces on each platform.

    Returns
    -------
    Diagnosis
        Takes some seconds for each platform.
    """
    versions = {"Python": sys.version.split()[0]}
    for package in ("openmm-se3", "openmm", "torch", "openmmml", "numpy"):
        versions[package] = installed_version(package) or "not installed"
    versions["openmm-torch"] = ", ".join(f"{d.name} {d.version}" for d in openmmtorch_builds()) or "not installed"
    driver, cuda, sees_gpu, platforms, silent = None, None, False, [], []
    try:
        driver = _driver()
    except (subprocess.TimeoutExpired, OSError) as error:
        silent = [
            Problem(f"nvidia-smi tells nothing of the NVIDIA driver ({error})", "run it by hand; restart the machine, or install the driver again")
        ]
    versions["NVIDIA driver, GPU"] = driver or "none"
    try:
        import torch

        cuda, sees_gpu = torch.version.cuda, torch.cuda.is_available()
        versions["CUDA of torch"] = f"{cuda or 'none'}, {'sees a GPU' if sees_gpu else 'sees no GPU'}"
    except Exception as error:
        versions["torch"] += f", but cannot be imported ({error})"
    try:
        import openmm

        from openmm_se3.platforms import platform_names

        platforms = platform_names()
        versions["OpenMM platforms"] = ", ".join(platforms)
        failures = [Path(text.removeprefix("Error loading library ")).name for text in openmm.Platform.getPluginLoadFailures()]
        versions["OpenMM plugins that failed"] = "\n".join(failures) or "none"
    except Exception as error:
        versions["openmm"] += f", but cannot be imported ({error})"
    evaluations = [e for platform in platforms for e in _evaluate_in_new_process(platform)]
    return Diagnosis(versions, evaluations, silent + _problems(driver, cuda, sees_gpu, platforms, evaluations))


if __name__ == "__main__":
    for name in ("PythonForce", "TorchForce"):
        sys.stdout.write(json.dumps(asdict(_evaluate(sys.argv[1], name))) + "\n")
        sys.stdout.flush()
