"""Released models, installed as data of the package; see README.md for the contract."""
