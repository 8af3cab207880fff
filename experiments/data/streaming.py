"""Images that do not fit into memory: decoded on the way, by threads, through Grain."""

import dataclasses
import json
import zlib
from collections.abc import Iterator

import numpy as np

from experiments.data import Source


@dataclasses.dataclass(frozen=True)
class OnDemand:
    """The examples at `positions` of a split of a source; see `images.ImageDataset`."""

    source: Source
    split: str
    positions: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The labels of these examples, `[N]` int32."""
        return self.source.labels(self.split)[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def examples(self, plan: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The images and labels of each row of a plan, decoded by threads one batch ahead."""
        import grain

        def decode(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images, labels = self.source.read(self.split, position[np.newaxis])
            return images[0], labels[0]

        threads = min(16, plan.shape[1])
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=plan.shape[1])
        stream = grain.MapDataset.source(self.positions[plan.reshape(-1)]).map(decode)
        batches = iter(stream.to_iter_dataset(options).batch(plan.shape[1]))
        try:
            yield from batches
        finally:
            batches.close()

    def checksum(self, before: int) -> int:
        """CRC-32 that continues `before`, see `ImageDataset.checksum`."""
        described = json.dumps([self.split, self.source.fingerprint()]).encode()
        return zlib.crc32(described, zlib.crc32(self.positions.astype("<i8"), before))
