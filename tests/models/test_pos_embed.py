import pytest
import torch

from dinov2.models.pos_embed import resize_grid


def test_positions_that_are_linear_stay_linear_away_from_the_border():
    ramp = torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 16, 1)
    resized = resize_grid(ramp, (32, 32), antialias=True)  # its cubic is exact for lines
    step = resized[0, 5:-5, 3, 0].diff()
    torch.testing.assert_close(step, torch.full_like(step, 0.5))


def test_rows_and_columns_keep_their_places():
    rows = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 8, 1)
    resized = resize_grid(rows, (4, 12))
    assert resized.shape == (1, 4, 12, 1)
    assert (resized[0, :, :, 0].diff(dim=0) > 0).all()
    torch.testing.assert_close(resized[0, :, :1, 0].expand(4, 12), resized[0, :, :, 0])


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_wanted_size_comes_out_for_every_grid_in_use(offset):
    grid = torch.randn(1, 37, 37, 2)
    for rows in range(1, 80):
        assert resize_grid(grid, (rows, 80 - rows), offset=offset).shape == (1, rows, 80 - rows, 2)


def test_half_precision_positions_are_interpolated_in_float32():
    grid = torch.randn(1, 16, 16, 4)
    half = resize_grid(grid.half(), (7, 7))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), resize_grid(grid.half().float(), (7, 7)), atol=1e-3, rtol=1e-3)


def test_an_offset_that_changes_the_size_is_refused():
    with pytest.raises(ValueError, match=r"interpolate_offset=1\.5"):
        resize_grid(torch.randn(1, 4, 4, 1), (6, 6), offset=1.5)
