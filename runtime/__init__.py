"""A training run's machinery.  It knows no equation and no model."""
