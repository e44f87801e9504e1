"""The training step as a LightningModule: one optimizer step, its schedule, weight averaging and its guard."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.averaging import averaged
from training.checkpoint import CheckpointError
from training.config import FitConfig
from training.data.batches import Batch, Collator, SizeSampler
from training.data.frames import DataError
from training.data.packed import PackedDataset
from training.data.splits import SPLIT_KEYS
from training.distributed import gather_from_ranks, sum_gradients, sum_over_ranks, world_size
from training.force_matching import backward_force_matching, positions_only
from training.guard import BatchGuard
from training.loss import EnergyForceLoss, ErrorSums, molecule_energies, predict
from training.network import build_network
from training.optimizer import learning_rate, make_optimizer

#: Processes that look for neighbours while a GPU computes; on a CPU they would only take its cores.
LOADERS_OF_A_GPU = 4


class _BatchStream(IterableDataset):
    """Endless batches from a given one on; each rank of a distributed run takes its share, each of its loaders one batch in turn."""

    def __init__(self, sampler: SizeSampler, collate: Collator, start: int, rank: int, world_size: int) -> None:
        self.sampler, self.collate, self.start, self.rank, self.world_size = sampler, collate, start, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        loader = get_worker_info()
        number, loaders = (0, 1) if loader is None else (loader.id, loader.num_workers)
        stream = self.sampler.stream(self.start * self.world_size)
        # A DataLoader takes from its loaders one after the other, so the batches come in the order of the stream.
        return map(self.collate, itertools.islice(stream, self.rank + number * self.world_size, None, loaders * self.world_size))


class TrainingModule(lightning.LightningModule):
    """Trains a network of either form on a packed data set.

    Parameters
    ----------
    config : FitConfig
        The run.
    dataset : PackedDataset
        The data; statistics of its metadata scale the network's outputs and the loss.
    """

    def __init__(self, config: FitConfig, dataset: PackedDataset) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.dataset = config, dataset
        numbers = tuple(NUMBER_OF_SYMBOL[s] for s in config.network.elements)
        self.network = build_network(config.network, numbers)
        force_scale = dataset.metadata["statistics"].get("force_rms", 1.0)
        if dataset.forces is None and config.loss.energy_weight == 0:
            raise DataError("the data have no forces and loss.energy_weight is zero; there is nothing to learn")
        if force_scale == 0 and (config.loss.force_weight > 0 or config.loss.conservative_weight > 0):
            raise DataError(
                "all forces of the frames to train on are zero, as placeholders are; prepare the data anew with --force-key, or with --energies-only"
            )
        self.network.energy_shift.copy_(torch.from_numpy(dataset.energy_shift()[list(numbers)]))
        self.network.force_scale.fill_(force_scale)
        self.loss = EnergyForceLoss(config.loss, self._energy_spread(), force_scale)
        self.network.energy_scale.fill_(self.loss.energy_scale)
        self.conservative = config.loss.conservative_weight > 0 and dataset.forces is not None
        self.ema = averaged(self.network, config.optimizer.ema_decay)
        self.collate = Collator(dataset, numbers, config.network.cutoff)
        #: Symbol to eV, of those elements of the network for which there is one: what total energies of the model are relative to.
        self.self_energies = {s: e for s, e in dataset.metadata["self_energies"].items() if s in config.network.elements}
        self.batches_seen = 0
        self.bad_batches: list[dict[str, Any]] = []
        self._not_finite, self._silent = BatchGuard("were not finite"), BatchGuard("were answered with zeros or with one energy per atom")
        self.latest: dict[str, float] = {}
        self._errors = ErrorSums()
        forward: Any = self.network
        atomic_energies: Any = positions_only(self.network)
        if config.run.compile:
            forward, atomic_energies = torch.compile(forward, dynamic=True), torch.compile(atomic_energies, dynamic=True)
        object.__setattr__(self, "_forward", forward)  # not a submodule: its weights are those of `network`
        self._atomic_energies = atomic_energies

    def _energy_spread(self) -> float:
        """Spread of what the network has to learn of the energies: what its shift per element leaves of the labels."""
        shift = np.zeros(256)
        shift[[NUMBER_OF_SYMBOL[s] for s in self.config.network.elements]] = self.network.energy_shift.cpu().numpy()
        return self.dataset.energy_spread(shift)

    # ---- data

    def sampler(self, split: str, processes: int = 1) -> SizeSampler:
        """Batches of a split, as frames, by the sizes and the seed of the run; of few frames so small that there is one for each process."""
        frames = self.dataset.indices(split)
        if len(frames) == 0:
            raise DataError(f"the {split} split is empty; prepare the data with other fractions or another seed")
        sizes = np.diff(self.dataset.offsets)[frames]
        run = self.config.run
        if len(frames) < processes:
            raise DataError(f"the {split} split has {len(frames)} frames, fewer than the {processes} processes that share them")
        return SizeSampler(frames, sizes, min(run.batch_molecules, len(frames) // processes), run.batch_edges, run.seed)

    def train_dataloader(self) -> DataLoader:
        """Endless stream that continues where the checkpoint stood."""
        stream = _BatchStream(self.sampler("train"), self.collate, self.batches_seen, self.global_rank, self.trainer.world_size)
        loaders = min(LOADERS_OF_A_GPU, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        return DataLoader(stream, batch_size=None, num_workers=loaders)

    def val_dataloader(self) -> DataLoader:
        """All batches of the validation split, smallest molecules first; of a distributed run, this process' share."""
        n_processes = self.trainer.world_size
        batches = self.sampler("validation", n_processes).epoch(0, shuffle=False)[self.global_rank :: n_processes]
        return DataLoader(batches, batch_size=None, collate_fn=self.collate)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch."""
        return batch.to(device)

    # ---- training

    def on_fit_start(self) -> None:
        """Scale the loss anew: the network of a start model or of a checkpoint brought a shift of its own."""
        self.loss.energy_scale = self._energy_spread()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the configuration."""
        return make_optimizer(self.network, self.config.optimizer)

    def differentiate(self, batch: Batch, whole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Add the gradient of the loss of a batch to that of the weights.

        Parameters
        ----------
        batch : Batch
            Of this process.
        whole : Tensor, optional
            Molecules and atoms in the batches of all processes, ``(2,)``, if there are several.

        Returns
        -------
        tuple of Tensor
            Losses ``(n_molecules,)``, energies, direct forces, and conservative forces or None.
        """
        if self.conservative:
            return backward_force_matching(self._forward, self._atomic_energies, batch, self.loss, whole)
        energies, direct, conservative = predict(self._forward, batch, False, create_graph=False)
        per_molecule = self.loss.per_molecule(energies, direct, conservative, batch, whole)
        per_molecule.mean().backward()  # not manual_backward, which would sum the gradients over the processes too
        return per_molecule, energies, direct, conservative

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step, or a counted and reported skip if the loss or the gradient is not finite.

        The batches of all processes count as one: losses and gradients are sums over them, so all take the same step or none does.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        self.batches_seen += 1
        rate = learning_rate(self.global_step, self.config.optimizer, self.config.run.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        whole = None
        if world_size() > 1:
            whole = sum_over_ranks(torch.tensor([len(batch.energies), len(batch.species)], dtype=torch.float64, device=self.device))
        per_molecule, energies, direct, conservative = self.differentiate(batch, whole)
        loss = sum_over_ranks(per_molecule.detach().mean())
        finite_here = sum_gradients(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.gradient_clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._report_bad_batch(batch, per_molecule, bool(finite_here))
            return
        self._not_finite.see(False, self.global_step)
        optimizer.step()
        self.ema.update_parameters(self.network)
        with torch.no_grad():
            errors = ErrorSums()
            errors.add_batch(energies, direct, conservative, batch)
        self.latest = {"loss": float(loss), "gradient_norm": float(norm), "learning_rate": rate, **errors.result()}
        silent = sum_over_ranks(torch.tensor(float(self._is_silent(energies, direct, batch)), device=self.device))
        self._silent.see(int(silent) == world_size(), self.global_step)

    def _report_bad_batch(self, batch: Batch, per_molecule: Tensor, finite_gradient: bool) -> None:
        finite = torch.isfinite(per_molecule)
        where = "gradient" if finite.all() else "loss"
        guilty = batch.frames[~finite] if not finite.all() else batch.frames[:0] if finite_gradient else batch.frames
        reports = [(w, frames) for w, frames in gather_from_ranks((where, guilty.tolist())) if frames]
        where = "loss" if any(w == "loss" for w, _ in reports) else "gradient"
        frames = [frame for _, each in reports for frame in each]
        for frame in frames:
            self.bad_batches.append(
                {"batch": self.batches_seen, "frame": frame, "formula": self.dataset.formula(frame), "reason": f"{where} not finite"}
            )
        names = ", ".join(f"{self.dataset.formula(f)} (frame {f})" for f in frames[:5])
        self.print(f"batch {self.batches_seen}: {where} not finite, step skipped; {len(frames)} molecules: {names}")
        self._not_finite.see(True, self.global_step)

    def _is_silent(self, energies: Tensor, direct: Tensor, batch: Batch) -> bool:
        """Whether the network says the same of everything: its non-linearities are dead, and no gradient will wake them."""
        if not batch.mask.any():  # isolated atoms
            return False
        if batch.forces is not None and self.config.loss.force_weight > 0:
            return not bool(direct.detach().any())
        shift = self.network.energy_shift
        per_atom = (energies.detach() - molecule_energies(shift[batch.species], batch)) / batch.n_atoms_of
        rounding = 1e-6 * float(shift.abs().max())  # of the shift, which was added in float32
        return len(per_atom) > 1 and bool(((per_atom - per_atom[0]).abs() <= rounding).all())

    # ---- validation, with the averaged weights

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._errors = ErrorSums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the errors of one batch."""
        self._errors.add_batch(*predict(self.ema.module, batch, self.conservative, create_graph=False), batch)

    def on_validation_epoch_end(self) -> None:
        """Publish the errors of all processes' batches, in eV and eV/Angstrom."""
        errors = ErrorSums()
        errors.add_all(gather_from_ranks(self._errors))
        self.validation_errors = errors.result()
        direct = self.dataset.forces is not None and self.config.loss.force_weight > 0
        key = "conservative_force_rmse" if self.conservative else "force_rmse" if direct else "energy_rmse"
        self.log("validation_error", self.validation_errors[key], sync_dist=True)

    # ---- checkpoints: plain data only

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add all that resuming and exporting need."""
        keep = ["elements", "self_energies_origin", "statistics", "sha256", "sources", "level_of_theory", *SPLIT_KEYS]
        checkpoint["openmm_se3"] = {
            "config": self.config.model_dump(mode="json"),
            "data": {k: self.dataset.metadata.get(k) for k in keep} | {"self_energies": self.self_energies},
            "batches_seen": self.batches_seen,
            "bad_batches": self.bad_batches,
            "processes": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the stream of batches, and refuse other data, or another number of processes, whose batches would be others."""
        ours = checkpoint["openmm_se3"]
        before, now = ours.get("processes"), self.trainer.world_size  # earlier versions did not tell
        if before not in (None, now):
            raise CheckpointError(
                f"the run was trained by {before} processes, one for each device, and is resumed with {now}: its batches would be others; resume "
                f"with --devices and --nodes that make {before}, or start a new run with initial_model"
            )
        if ours["data"]["sha256"] != self.dataset.metadata["sha256"]:
            raise DataError("the checkpoint was trained on other data than configured; resume with the same packed data set")
        kept, present = ({k: data.get(k) for k in SPLIT_KEYS} for data in (ours["data"], self.dataset.metadata))
        tables = ours["data"]["self_energies"], self.dataset.metadata["self_energies"]
        for symbol in tables[0].keys() & tables[1].keys():  # a start model may have added others
            kept[symbol], present[symbol] = (round(table[symbol], 6) for table in tables)
        changed = [f"{k} was {kept[k]}, now {present[k]}" for k in kept if kept[k] != present[k] and (k in ours["data"] or k in tables[0])]
        if changed:
            raise DataError(
                f"the data were prepared anew since the checkpoint was written: {'; '.join(changed)}; prepare them as they were, or start a new run"
            )
        self.self_energies = ours["data"]["self_energies"]
        self.batches_seen = ours["batches_seen"]
        self.bad_batches = ours["bad_batches"]
