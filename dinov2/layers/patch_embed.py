"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    pair = tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name}={value} must be one integer or (height, width)")
    return pair


class PatchEmbed(nn.Module):
    """One linear map of each non-overlapping patch, written as a convolution.

    Args:
        img_size: height and width that the model is built for, pixels; other sizes are accepted in `forward`.
        patch_size: height and width of a patch, pixels.
        in_chans: image channels.
        embed_dim: width of a token.
        norm_layer: built with `embed_dim` and applied to the tokens, when given.
        flatten_embedding: return `(B, N, D)`; otherwise `(B, rows, columns, D)`.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size, "img_size")
        self.patch_size = _pair(patch_size, "patch_size")
        self.patches_resolution = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens, row by row.

        Raises:
            ValueError: H or W is not a multiple of the patch, or C is not `in_chans`.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (batch, {self.in_chans}, height, width), got shape {tuple(x.shape)}")
        for name, size, patch in zip(("height", "width"), x.shape[-2:], self.patch_size):
            if size % patch:
                below = size // patch * patch
                nearest = f"{below} and {below + patch}" if below else str(patch)
                raise ValueError(
                    f"image {name} {size} is not a multiple of the patch size {patch}; nearest multiples: {nearest}"
                )
        x = self.proj(x)
        rows, columns = x.shape[-2:]
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x if self.flatten_embedding else x.unflatten(1, (rows, columns))

    def flops(self) -> float:
        """Multiply-adds for one image of `img_size`."""
        flops = self.num_patches * self.embed_dim * self.in_chans * self.patch_size[0] * self.patch_size[1]
        return flops if isinstance(self.norm, nn.Identity) else flops + self.num_patches * self.embed_dim
