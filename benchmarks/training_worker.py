"""Optimizer steps of one network on given batches; run by `benchmarks.training_throughput`, in the interpreter that holds the network.

Every line of standard input is answered by a step on the next batch and a JSON record of the time it took.
"""

import argparse
import json
import sys
import time
import warnings

import numpy as np
import torch

CLIP, LEARNING_RATE, EMA_DECAY = 10.0, 1e-3, 0.999


class SE3:
    """Production network of this project; `options`: ``direct`` or ``conservative``, and ``,compile``."""

    def __init__(self, options, scales):
        from training.config import LossConfig
        from training.force_matching import positions_only
        from training.loss import EnergyForceLoss
        from training.network import NetworkConfig, build_network

        mode, _, compiled = options.partition(",")
        if mode not in ("direct", "conservative") or compiled not in ("", "compile"):
            raise ValueError(f"options must be direct or conservative, with ',compile' or without, got {options!r}")
        self.conservative = mode == "conservative"
        self.network = build_network(NetworkConfig(), (1, 6, 7, 8))
        self.network.energy_scale.fill_(scales[0])
        self.network.force_scale.fill_(scales[1])
        self.loss = EnergyForceLoss(LossConfig(energy_weight=1.0, conservative_weight=0.5 if self.conservative else 0.0), *scales)
        self.forward, self.energies = self.network, positions_only(self.network)
        if compiled:
            self.forward, self.energies = torch.compile(self.forward, dynamic=True), torch.compile(self.energies, dynamic=True)

    def prepare(self, arrays):
        """A batch in the form that `backward` takes."""
        from training.data.batches import Batch

        return Batch(**{name: torch.from_numpy(a) for name, a in arrays.items()})

    def backward(self, batch):
        """Accumulate the gradient; returns the loss."""
        from training.force_matching import backward_force_matching
        from training.loss import predict

        if self.conservative:
            return float(backward_force_matching(self.forward, self.energies, batch, self.loss)[0].mean())
        loss = self.loss.per_molecule(*predict(self.forward, batch, False, create_graph=False), batch).mean()
        loss.backward()
        return float(loss)


class NequIP:
    """NequIP; `options`: ``L_MAX,LAYERS,FEATURES``. Energies and their gradient, as it is always trained."""

    def __init__(self, options, scales):
        from nequip.model import NequIPGNNModel
        from nequip.model.utils import override_model_compile_mode
        from nequip.utils.global_state import set_global_state

        set_global_state()
        l_max, layers, features = (int(n) for n in options.split(","))
        sizes = {"num_layers": layers, "l_max": l_max, "parity": True, "num_features": features, "radial_mlp_depth": 2, "radial_mlp_width": 64}
        offsets = {"avg_num_neighbors": 15.0, "per_type_energy_scales": scales[1], "per_type_energy_shifts": 0.0}
        with override_model_compile_mode("eager"):
            model = NequIPGNNModel(seed=1, model_dtype="float32", r_max=5.0, type_names=["H", "C", "N", "O"], **sizes, **offsets)
        self.network = model["sole_model"] if isinstance(model, torch.nn.ModuleDict) else model
        self.network.train()
        self.scales = scales

    def prepare(self, arrays):
        """A batch in the form that `backward` takes."""
        receivers, slots = np.nonzero(arrays["mask"])
        data = {
            "pos": torch.from_numpy(arrays["positions"]),
            "atom_types": torch.from_numpy(arrays["species"]),
            "edge_index": torch.from_numpy(np.stack([receivers, arrays["neighbors"][receivers, slots]])),
            "batch": torch.from_numpy(arrays["molecule"]),
            "num_atoms": torch.from_numpy(arrays["n_atoms_of"]),
        }
        return data, torch.from_numpy(arrays["energies"]), torch.from_numpy(arrays["forces"])

    def backward(self, batch):
        """Accumulate the gradient; returns the loss."""
        data, energies, forces = batch
        out = self.network({k: v.clone() for k, v in data.items()})
        energy_error = (out["total_energy"].squeeze(-1) - energies) / self.scales[0]
        loss = (energy_error.square() / data["num_atoms"]).mean() + ((out["forces"] - forces) / self.scales[1]).square().mean()
        loss.backward()
        return float(loss)


class MACE:
    """MACE, 2 interactions, correlation 3, degrees up to 3 on edges; `options`: ``CHANNELS,L``. Energies and their gradient."""

    def __init__(self, options, scales):
        from mace import modules  # first: it lets torch read what its version of e3nn loads

        # isort: split
        from e3nn import o3

        channels, degree = (int(n) for n in options.split(","))
        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.network = modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls_first=block,
            interaction_cls=block,
            num_interactions=2,
            num_elements=4,
            hidden_irreps=o3.Irreps(" + ".join(f"{channels}x{k}{'eo'[k % 2]}" for k in range(degree + 1))),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.zeros(4),
            avg_num_neighbors=15.0,
            atomic_numbers=[1, 6, 7, 8],
            correlation=3,
            gate=torch.nn.functional.silu,
            atomic_inter_scale=scales[1],
            atomic_inter_shift=0.0,
        )
        self.network.train()
        self.scales = scales

    def prepare(self, arrays):
        """A batch in the form that `backward` takes."""
        receivers, slots = np.nonzero(arrays["mask"])
        senders = arrays["neighbors"][receivers, slots]
        sizes = torch.from_numpy(arrays["n_atoms_of"])
        data = {
            "positions": torch.from_numpy(arrays["positions"]),
            "node_attrs": torch.nn.functional.one_hot(torch.from_numpy(arrays["species"]), 4).to(torch.float32),
            "edge_index": torch.from_numpy(np.stack([senders, receivers])),
            "shifts": torch.zeros(len(senders), 3),
            "unit_shifts": torch.zeros(len(senders), 3),
            "cell": torch.zeros(3 * len(sizes), 3),
            "batch": torch.from_numpy(arrays["molecule"]),
            "ptr": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(sizes, 0)]),
            "head": torch.zeros(len(sizes), dtype=torch.int64),
        }
        return data, sizes, torch.from_numpy(arrays["energies"]), torch.from_numpy(arrays["forces"])

    def backward(self, batch):
        """Accumulate the gradient; returns the loss."""
        data, sizes, energies, forces = batch
        out = self.network({k: v.clone() for k, v in data.items()}, training=True, compute_force=True)
        energy_error = (out["energy"] - energies) / self.scales[0]
        loss = (energy_error.square() / sizes).mean() + ((out["forces"] - forces) / self.scales[1]).square().mean()
        loss.backward()
        return float(loss)


NETWORKS = {"se3": SE3, "nequip": NequIP, "mace": MACE}


def main():
    """Build, then step on demand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("network", help="NAME=OPTIONS, of " + ", ".join(NETWORKS))
    parser.add_argument("batches", help="npz of benchmarks.training_throughput")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    stored = np.load(arguments.batches)
    name, _, options = arguments.network.partition("=")
    subject = NETWORKS[name](options, [float(x) for x in stored["scales"]])
    batches = []
    for k in range(int(stored["n_batches"])):
        prefix = f"{k}/"
        batches.append(subject.prepare({key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}))
    sizes = [len(stored[f"{k}/energies"]) for k in range(len(batches))]
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    averaged = [p.detach().clone() for p in parameters]
    for step, _ in enumerate(sys.stdin):
        k = step % len(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = subject.backward(batches[k])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - EMA_DECAY)
        record = {"batch": k, "molecules": sizes[k], "loss": loss, "parameters": sum(p.numel() for p in parameters)}
        record |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
