"""Everything that README, documentation and model cards quote, printed again: ``python -m benchmarks`` lists the benchmarks.

Each of those is a module with a `main`; so are the scripts in `accuracy`, which make the data of its tables. The rest serves them::

    workers                          processes that are timed beside each other
    speed_worker, training_worker    what runs in them, in whatever interpreter holds a potential or a network
    systems, clusters                structures
    evaluation                       modules of a model, called as TorchForce calls them
    records                          the machine and versions that every record holds
"""
