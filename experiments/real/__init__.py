"""Networks that others trained, and what is left of them: ``python -m experiments.real``."""
