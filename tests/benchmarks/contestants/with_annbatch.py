"""An epoch of dense batches by annbatch, from its own zarr shards and from a matrix in memory, in its own environment."""

import warnings
from pathlib import Path

import annbatch
import anndata
import numpy as np
import zarr
from serve import serve

warnings.simplefilter("ignore")
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def zarred(path, batch_size, folder):
    """From lz4 zarr, written once as annbatch writes it; chunks of 512 rows, 32 at once, its defaults."""
    place = Path(folder) / "annbatch.zarr"
    if not (place / "done").exists():
        group = zarr.open_group(place, mode="w", zarr_format=3)
        annbatch.write_sharded(group, anndata.read_h5ad(path))
        (place / "done").touch()
    return _epochs(zarr.open_group(place, mode="r"), batch_size, chunk_size=512, preload_nchunks=32)


def memory(path, batch_size):
    """From CSR in memory, chunks of 64 rows, 256 at once: the same number of rows at once as from zarr."""
    return _epochs(anndata.read_h5ad(path), batch_size, chunk_size=64, preload_nchunks=256)


def _epochs(source, batch_size, **how):
    X = anndata.io.sparse_dataset(source["X"]) if isinstance(source, zarr.Group) else source.X
    loader = annbatch.Loader(batch_size=batch_size, shuffle=True, rng=np.random.default_rng(0), **how)
    loader.add_dataset(X)

    def epoch():
        cells = 0
        for batch in loader:
            cells += len(batch["X"].toarray().astype(np.float32, copy=False))
        return cells

    epoch()  # starts threads and compiles
    return epoch


if __name__ == "__main__":
    serve({"zarr": zarred, "memory": memory})
