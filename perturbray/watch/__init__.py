"""The live page of a sweep: drawn from its results folder alone, on this machine alone."""
