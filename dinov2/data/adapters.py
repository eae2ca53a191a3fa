"""Wrappers that change what a data set's items look like."""

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset):
    """Give each item's own index along with its target: `(image, (index, target))`.

    Evaluations that run on several processes use it to put results back in order. A target of None, which a batch
    cannot hold, becomes the index.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        image, target = self._dataset[index]
        return image, (index, index if target is None else target)

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image."""
        return self._dataset.get_image_data(index)

    def get_target(self, index: int) -> tuple[int, Any]:
        """Return the index and the target."""
        return index, self._dataset.get_target(index)
