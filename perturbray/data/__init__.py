"""From a file of cells to batches: datasets, splits, ablations, blocks, batches."""
