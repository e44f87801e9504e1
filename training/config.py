"""Configuration of a training run: one YAML file, every key checked, copied into every checkpoint."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, PositiveInt, Tag, ValidationError, field_validator, model_validator

from training.network import AnyNetworkConfig, NetworkConfig, ReferenceConfig

# Pydantic reads this from the dataclasses: unknown keys are refused there too.
for _form in (NetworkConfig, ReferenceConfig):
    _form.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[union-attr]


def _form_of(network: Any) -> str:
    """Which form a configuration speaks of; without a word, as in files older than the reference form, it is the production form."""
    return str(network.get("form", "production") if isinstance(network, dict) else getattr(network, "form", "production"))


_Network = Annotated[
    Annotated[NetworkConfig, Tag("production")] | Annotated[ReferenceConfig, Tag("reference")],
    Discriminator(_form_of),
]


_Schema = TypeVar("_Schema", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration is not usable; the message names the key, what was expected and what came."""


class Section(BaseModel):
    """A part of a configuration: unknown keys and what is not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossConfig(Section):
    """Weights of equation 3.2; each term is normalised by the spread of its labels before it is weighted.

    Attributes
    ----------
    energy_weight, force_weight, conservative_weight : float
        Of energies, direct forces, and minus the gradient of the energy.
    energy_huber, force_huber : float or None
        Errors beyond this many spreads of the labels (per square root of an atom, and per component) count linearly instead of squared, so that
        a few frames far from the rest, or with bad labels, do not drown all others. None: squared everywhere.
    """

    energy_weight: float = Field(default=0.1, ge=0)
    force_weight: float = Field(default=1.0, ge=0)
    conservative_weight: float = Field(default=0.0, ge=0)
    energy_huber: PositiveFloat | None = None
    force_huber: PositiveFloat | None = None

    @property
    def forces(self) -> tuple[str, ...]:
        """Which forces are trained on, as errors name them: ``conservative_force``, by which a model is chosen if it is there, and ``force``."""
        weights = {"conservative_force": self.conservative_weight, "force": self.force_weight}
        return tuple(name for name, weight in weights.items() if weight > 0)


class OptimizerConfig(Section):
    """Optimizer, learning-rate schedule and clipping of the gradient norm.

    Attributes
    ----------
    kind : str
        ``adam``, or ``muon``, which takes Adam for what are no matrices; see `training.optimizer`.
    ema_decay : float
        Of the averaged weights, which are validated and exported; less at first, see `training.averaging`.
    """

    kind: Literal["adam", "muon"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["warmup-cosine", "steps"] = "warmup-cosine"
    warmup_steps: int = Field(default=500, ge=0)
    final_fraction: float = Field(default=0.01, ge=0, le=1)
    milestones: tuple[PositiveInt, ...] = ()
    drop: float = Field(default=0.1, gt=0, lt=1)
    gradient_clip: PositiveFloat = 10.0
    ema_decay: float = Field(default=0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _of_the_schedule(self) -> "OptimizerConfig":
        other = ("milestones", "drop") if self.schedule == "warmup-cosine" else ("warmup_steps", "final_fraction")
        idle = [name for name in other if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(f"{' and '.join(idle)} have no effect with schedule {self.schedule!r}; leave them out, or choose the other schedule")
        return self


class RunConfig(Section):
    """How long, in what portions, how often to look."""

    max_steps: PositiveInt = 100_000
    batch_molecules: PositiveInt = 100
    batch_edges: PositiveInt = 25_000
    validate_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 20
    seed: int = Field(default=0, ge=0, lt=2**32)
    compile: bool = False


class FitConfig(Section):
    """Everything `fit` needs besides the output directory.

    Attributes
    ----------
    data : str
        Directory of the packed data set.
    initial_model : str or None
        Whose weights to start from: a checkpoint, an exported file, or the name of a released model. The sizes in `network` must be
        those of that model. To continue a run, resume it.
    """

    data: str
    initial_model: str | None = None
    network: _Network = NetworkConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @field_validator("network")
    @classmethod
    def _network_sizes(cls, network: AnyNetworkConfig) -> AnyNetworkConfig:
        unknown = [symbol for symbol in network.elements if NUMBER_OF_SYMBOL.get(symbol, 0) == 0]  # 0: the X of dummy atoms
        if unknown or not network.elements:
            raise ValueError(f"elements must be chemical symbols such as H or Cl, at least one, got {', '.join(unknown) or 'none'}")
        if len(set(network.elements)) < len(network.elements):
            raise ValueError(f"elements must each be named once, got {', '.join(network.elements)}")
        for name in (f.name for f in fields(network)):
            size = getattr(network, name)
            if isinstance(size, int) and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if isinstance(network, ReferenceConfig):
            return network  # it refuses what else it cannot build itself
        if len(network.channels) != 3 or min(network.channels) < 1:
            raise ValueError(f"channels must be three positive numbers (degrees 0, 1, 2), got {network.channels}")
        if network.hidden_channels % network.num_heads:
            raise ValueError(f"hidden_channels ({network.hidden_channels}) must be divisible by num_heads ({network.num_heads})")
        if network.cutoff <= 0:
            raise ValueError(f"cutoff must be positive (Angstrom), got {network.cutoff}")
        return network

    @model_validator(mode="after")
    def _something_to_learn(self) -> "FitConfig":
        if self.loss.energy_weight == self.loss.force_weight == self.loss.conservative_weight == 0:
            raise ValueError("all weights of the loss are zero; there is nothing to learn")
        return self


def parse_config(raw: Any, origin: str) -> FitConfig:
    """Check plain data against the schema; raises as `validated`."""
    return validated(FitConfig, raw, origin)


def validated(schema: type[_Schema], raw: Any, origin: str) -> _Schema:
    """Check plain data against a schema.

    Raises
    ------
    ConfigError
        One line per problem: the key, what is wrong, and what came.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            loc = problem["loc"]
            if loc[:1] == ("network",):
                loc = tuple(part for part in loc if part not in ("production", "reference"))  # pydantic's names of the forms
            key = ".".join(str(part) for part in loc) or "top level"
            if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                lines.append(f"{key}: unknown key")
            else:
                lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def read_config(path: Path) -> FitConfig:
    """Read a YAML file; raises `ConfigError` if it is missing, no YAML or not to the schema."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return parse_config(raw, str(path))
