"""Block-wise masks over the patch grid of an image."""

import math
import random

import numpy as np


class MaskingGenerator:
    """Draw masks made of rectangular blocks of patches.

    Blocks are placed until the wanted number of patches is masked or no further block fits. The area of a block is
    uniform between `min_num_patches` and what is still wanted (at most `max_num_patches`); its log aspect ratio is
    uniform between those of `min_aspect` and `max_aspect`.

    Args:
        input_size: height and width of the patch grid, or one number for a square.
        num_masking_patches: patches masked by a call that names no number; none by default.
        min_num_patches: smallest area drawn for a block, patches.
        max_num_patches: largest area of a block, patches; the number asked for when None.
        min_aspect: smallest height to width ratio of a block.
        max_aspect: largest one; `1 / min_aspect` when None.

    Source: Bao et al., "BEiT: BERT pre-training of image transformers", ICLR 2022, algorithm 1.
    """

    _TRIES_PER_BLOCK = 10

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: float = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = input_size if isinstance(input_size, tuple) else (input_size, input_size)
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = max_num_patches
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = (math.exp(bound) for bound in self.log_aspect_ratio)
        return (
            f"{type(self).__name__}(grid {self.height} x {self.width}, blocks of {self.min_num_patches} to "
            f"{self.max_num_patches or 'all wanted'} patches, aspect {low:.2f} to {high:.2f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """Height and width of the masks, patches."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int | None = None, rng: random.Random | None = None) -> np.ndarray:
        """Draw one mask.

        Args:
            num_masking_patches: how many patches to mask; never exceeded, and seldom missed by more than a few.
            rng: source of the draws; Python's global one when None.

        Returns:
            A boolean array of shape `(height, width)`, True where masked.
        """
        wanted = self.num_masking_patches or 0 if num_masking_patches is None else num_masking_patches
        draws = rng or random
        mask = np.zeros(self.get_shape(), dtype=bool)
        masked = 0
        while masked < wanted:
            left_over = wanted - masked
            limit = left_over if self.max_num_patches is None else min(left_over, self.max_num_patches)
            added = self._add_block(mask, limit, draws)
            if not added:
                break
            masked += added
        return mask

    def _add_block(self, mask: np.ndarray, limit: float, draws: random.Random) -> int:
        """Mask one more block in place; return how many patches that added, 0 when no block fitted."""
        for _ in range(self._TRIES_PER_BLOCK):
            area = draws.uniform(self.min_num_patches, limit)
            aspect = math.exp(draws.uniform(*self.log_aspect_ratio))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = draws.randint(0, self.height - height)
            left = draws.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            added = block.size - np.count_nonzero(block)
            if 0 < added <= limit:
                block[...] = True
                return added
        return 0
