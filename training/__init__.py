"""The training pipeline: data, network, loss, checkpoint, exported model. Run it as ``python -m training``.

Which file makes which step::

    HDF5 / extxyz -> molecules     data.hdf5, data.extxyz; data.prepare packs them (its own map is in `training.data`)
    molecules -> batch             data.batches
    batch -> network               network, one concept per file; network.reference is the thesis' own form
    network -> loss                loss; force_matching differentiates conservative forces
    loss -> checkpoint             fit sets a run up, module takes its steps, run keeps it resumable, checkpoint writes and reads it
    checkpoint -> exported file    export; exported and fused are what the file holds, committee what one of several networks does

Beside these: `evaluate` and `comp6` measure errors, `sweep` and `ablate` compare runs, `figures` draws them, `align` brings data to one level of
theory, `label` makes data, `nbody` trains the same layers on another task. All else serves one of these files.
"""
