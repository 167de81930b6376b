"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017): every experiment, one engine."""

__version__ = "0.1.0"
