"""An epoch of dense batches by scDataset from a backed h5ad file, in its best measured setting (blocks of 64, fetch 16)."""

import warnings

import anndata
import torch
from serve import serve

warnings.simplefilter("ignore")


def epoch(path, batch_size, part=1.0):
    """``part`` of the batches of an epoch."""
    from scdataset import BlockShuffling, scDataset

    torch.set_num_threads(1)
    data = anndata.read_h5ad(path, backed="r")

    def fetch(collection, rows):
        return collection.X[rows]

    def dense(batch):
        return torch.from_numpy(batch.toarray())

    loader = scDataset(
        data, BlockShuffling(64), batch_size=batch_size, fetch_factor=16, fetch_callback=fetch, batch_transform=dense
    )
    batches = max(1, round(len(loader) * part))
    return lambda: sum(len(batch) for _, batch in zip(range(batches), loader, strict=False))


if __name__ == "__main__":
    serve({"epoch": epoch})
