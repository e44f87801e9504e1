"""The training pipeline: data, network, loss, checkpoint, exported model. Run it as ``python -m training``."""
