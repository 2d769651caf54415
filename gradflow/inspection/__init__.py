"""Any JAX model, read as it is: measured, predicted, and mended."""
