"""Vectors that describe perturbations or cells, made elsewhere."""
