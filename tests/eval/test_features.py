import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.features import (
    FeatureTable,
    ImageFiles,
    extract,
    extract_with,
    normalise_images,
    parse_features,
    prepare_image,
)


def picture(height, width, seed=0):
    """Smooth colours, as a microscope gives them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


class Pictures:
    """A labelled data set in memory; `broken` rows cannot be read."""

    classes = ("a", "b")

    def __init__(self, count, broken=()):
        self.labels = np.arange(count) % 2
        self.paths = [f"{i}.png" for i in range(count)]
        self.sources = [f"scanner{i % 3}" for i in range(count)]
        self.broken = broken

    def __len__(self):
        return len(self.labels)

    def read(self, row):
        from dinov2.data.decode import UnreadableImage

        if row in self.broken:
            raise UnreadableImage(self.paths[row], "file is cut off")
        return picture(60 + row, 70, seed=row)


@pytest.mark.parametrize(("height", "width"), [(363, 360), (100, 131), (575, 575), (256, 300), (48, 40)])
def test_the_view_of_an_image_is_that_of_torchvision_on_pil_images(height, width):
    image = picture(height, width)
    theirs = make_classification_eval_transform()(Image.fromarray(image))
    ours = normalise_images(prepare_image(image, 224)[None])[0]
    difference = (ours - theirs).abs() * 255 * 0.22  # in levels of 0..255, roughly
    assert ours.shape == (3, 224, 224)
    assert difference.mean() < 0.5
    assert difference.max() < 4


def test_features_are_those_of_the_model_on_the_same_pixels(tiny_vit):
    data = Pictures(5)
    table = extract(tiny_vit, data, image_size=56, batch_size=2, num_workers=0, features="cls+patch_mean+registers")
    images = normalise_images(torch.stack([prepare_image(data.read(i), 56) for i in range(5)]))
    with torch.no_grad():
        tokens = tiny_vit.forward_features(images)
    expected = torch.cat(
        [
            tokens["x_norm_clstoken"],
            tokens["x_norm_patchtokens"].mean(1),
            tokens["x_norm_regtokens"].reshape(5, 4 * 32),
        ],
        dim=1,
    )
    np.testing.assert_allclose(table.features, expected, atol=1e-5)
    assert table.columns == {"cls": (0, 32), "patch_mean": (32, 64), "registers": (64, 192)}
    assert table.labels.tolist() == [0, 1, 0, 1, 0]
    assert table.sources[:4] == ["scanner0", "scanner1", "scanner2", "scanner0"]
    assert table.sizes.tolist()[2] == [62, 70]


def test_threads_change_nothing(tiny_vit):
    tables = [extract(tiny_vit, Pictures(9), image_size=56, batch_size=4, num_workers=n) for n in (0, 3)]
    np.testing.assert_array_equal(tables[0].features, tables[1].features)
    assert tables[0].paths == tables[1].paths


def test_an_unreadable_image_is_listed_and_the_others_stay_in_order(tiny_vit, caplog):
    whole = extract(tiny_vit, Pictures(7), image_size=56, batch_size=3, num_workers=0)
    holed = extract(tiny_vit, Pictures(7, broken={0, 3, 4, 5}), image_size=56, batch_size=3, num_workers=0)
    assert tuple(holed.unreadable[0]) == (0, "0.png", "file is cut off")
    assert holed.paths == ["1.png", "2.png", "6.png"]
    assert holed.labels.tolist() == [1, 0, 0]
    np.testing.assert_allclose(holed.features, whole.features[[1, 2, 6]], atol=1e-5)
    assert "4 of 7 images cannot be read" in caplog.text


def test_a_data_set_without_a_readable_image_is_an_error(tiny_vit):
    with pytest.raises(ValueError, match="none of the 3 images can be read; first: 0"):
        extract(tiny_vit, Pictures(3, broken={0, 1, 2}), image_size=56, num_workers=0)


def test_an_empty_data_set_is_an_error(tiny_vit):
    with pytest.raises(ValueError, match="no image"):
        extract(tiny_vit, Pictures(0), image_size=56)


def test_a_size_that_patches_do_not_tile_names_the_nearest_that_fits(tiny_vit):
    with pytest.raises(ValueError, match=r"image_size=60 .* patch size 14; nearest: 56"):
        extract(tiny_vit, Pictures(2), image_size=60)


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="unknown features 'clss'"):
        parse_features("clss+patch_mean")


def test_registers_of_a_model_without_them_are_refused(tiny_vit):
    tiny_vit.num_register_tokens, tiny_vit.register_tokens = 0, None
    with pytest.raises(ValueError, match="without register tokens"):
        extract(tiny_vit, Pictures(2), image_size=56, num_workers=0, features="registers")


def test_every_module_keeps_the_mode_that_it_had(tiny_vit):
    tiny_vit.train()
    tiny_vit.blocks[0].eval()
    before = [module.training for module in tiny_vit.modules()]
    extract(tiny_vit, Pictures(2), image_size=56, num_workers=0)
    assert [module.training for module in tiny_vit.modules()] == before


def test_half_precision_is_close_to_full_and_the_table_is_float32(tiny_vit):
    full, half = (
        extract(tiny_vit, Pictures(4), image_size=56, num_workers=0, dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    assert half.features.dtype == np.float32
    assert 0 < np.abs(half.features - full.features).max() < 0.1


def test_parts_of_a_table_can_be_selected(tiny_vit):
    data = Pictures(3)
    every = extract(tiny_vit, data, image_size=56, num_workers=0, features="cls+patch_mean")
    for features in ("patch_mean", "patch_mean+cls"):
        alone = extract(tiny_vit, data, image_size=56, num_workers=0, features=features)
        np.testing.assert_array_equal(every.select(features).features, alone.features)
        assert every.select(features).columns == alone.columns
    with pytest.raises(ValueError, match="registers"):
        every.select("registers")


def test_a_table_survives_the_disk(tmp_path, tiny_vit):
    table = extract(tiny_vit, Pictures(4, broken={1}), image_size=56, num_workers=0)
    table.save(tmp_path / "table")
    again = FeatureTable.load(tmp_path / "table")
    np.testing.assert_array_equal(again.features, table.features)
    assert again.labels.tolist() == table.labels.tolist()
    assert list(again.paths) == list(table.paths)
    assert (list(again.classes), list(again.sources), list(again.groups)) == (["a", "b"], list(table.sources), [])
    assert again.columns == table.columns
    assert list(again.unreadable) == list(table.unreadable)


def test_normalised_rows_have_length_one():
    table = FeatureTable(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.zeros(2, np.int64), ["a", "b"])
    np.testing.assert_allclose(table.normalised().features, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_any_function_of_pixels_makes_a_table():
    data = Pictures(3)
    table = extract_with(lambda images: {"mean": images.float().mean(dim=(2, 3))}, data, image_size=56, num_workers=0)
    expected = [prepare_image(data.read(i), 56).float().mean(dim=(1, 2)).tolist() for i in range(3)]
    np.testing.assert_allclose(table.features, expected, rtol=1e-5)


def test_a_list_of_files_is_a_data_set_and_may_be_thinned(tmp_path, tiny_vit):
    for i in range(6):
        Image.fromarray(picture(64, 64, seed=i)).save(tmp_path / f"{i}.png")
    paths = sorted(str(p) for p in tmp_path.iterdir())
    table = extract(tiny_vit, ImageFiles(paths, limit=3), image_size=56, num_workers=0)
    assert [path[-5] for path in table.paths] == ["0", "2", "5"]
    assert table.labels.tolist() == [-1, -1, -1]
