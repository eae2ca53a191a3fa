import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2
from dinov2.data import LabelledDataset
from dinov2.data.decode import read_rgb
from dinov2.eval import embed
from dinov2.eval.features import extract
from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import save_backbone

MEAN, STD = [0.7, 0.6, 0.5], [0.1, 0.2, 0.3]
RUN = {"crops": {"global_crops_size": 56}, "augmentations": {"mean": MEAN, "std": STD}}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_backbone(vit_tiny(patch_size=28, img_size=56, depth=2, num_register_tokens=2, init_values=1.0), path, RUN)
    return path


@pytest.fixture
def paths(cell_folder):
    return sorted(cell_folder.rglob("*.jpg"))[::5]


def as_tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_rgb(path)).permute(2, 0, 1)


FORMS = {
    "paths": lambda paths: paths,
    "text": lambda paths: [str(path) for path in paths],
    "PIL": lambda paths: [Image.open(path) for path in paths],
    "arrays": lambda paths: [read_rgb(path) for path in paths],
    "tensors": lambda paths: [as_tensor(path) for path in paths],
    "one array": lambda paths: np.stack([read_rgb(path) for path in paths]),
    "one tensor": lambda paths: torch.stack([as_tensor(path) for path in paths]),
    "a generator": lambda paths: (read_rgb(path) for path in paths),
    "a mixture": lambda paths: [paths[0], Image.open(paths[1]), read_rgb(paths[2]), *map(as_tensor, paths[3:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_form_get_the_features_that_evaluations_use(weights, paths, cell_folder, form):
    model = dinov2.load(weights)
    every = LabelledDataset(cell_folder)
    features = "cls+patch_mean+registers"
    table = extract(model, every, image_size=56, num_workers=0, features=features, mean=MEAN, std=STD)
    rows = [list(every.paths).index(str(path)) for path in paths]
    found = model.embed(FORMS[form](paths), features=features, batch_size=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, table.features[rows], atol=1e-5)


def test_files_get_the_features_that_dinov2_embed_writes(tmp_path, weights, cell_folder):
    out = tmp_path / "cells.parquet"
    assert embed.main(["--weights", str(weights), "--data", str(cell_folder), "--out", str(out)]) == 0
    table = embed.load_embeddings(out, "cls")
    np.testing.assert_allclose(dinov2.load(weights).embed(list(table.paths)), table.features, atol=1e-5)


def test_one_image_is_one_row(weights, paths):
    model = dinov2.load(weights)
    rows = [model.embed(form) for form in (paths[0], Image.open(paths[0]), read_rgb(paths[0]), as_tensor(paths[0]))]
    assert [row.shape for row in rows] == [(1, 192)] * 4
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_floats_gray_and_transparent_images_mean_what_their_files_do(weights, paths):
    model = dinov2.load(weights)
    image = read_rgb(paths[0])
    gray = np.ascontiguousarray(image[..., 1])
    alpha, white = np.zeros_like(gray), image.copy()
    alpha[:32], white[32:] = 255, 255
    same = {
        "floats": (image.astype(np.float64) / 255, image),
        "half": (as_tensor(paths[0]).to(torch.bfloat16) / 255, as_tensor(paths[0]).to(torch.bfloat16).float() / 255),
        "gray": (gray, gray[..., None].repeat(3, axis=2)),
        "gray tensor": (torch.from_numpy(gray)[None], gray),
        "16 bit": (image.astype(np.uint16) * 257, image),
        "transparent": (Image.fromarray(np.dstack([image, alpha])), white),
    }
    for name, (one, other) in same.items():
        np.testing.assert_allclose(model.embed(one), model.embed(other), atol=0.05, err_msg=name)
    # bytes beside floats are brought to one scale
    np.testing.assert_allclose(model.embed([image, image / 255.0]), model.embed([image / 255.0] * 2), atol=0.05)


def test_size_and_precision_can_be_chosen(weights, paths):
    model = dinov2.load(weights, device="cpu")
    assert not np.allclose(model.embed(paths), model.embed(paths, image_size=84), atol=1e-3)
    rounded = model.embed(paths, dtype="bf16")
    assert 0 < np.abs(rounded - model.embed(paths)).max() < 0.2


def test_the_model_is_otherwise_the_backbone_and_can_be_copied(weights, paths):
    model = dinov2.load(weights)
    assert (model.mean, model.std, model.image_size) == (tuple(MEAN), tuple(STD), 56)
    expected = model.embed(paths)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.embed(paths), expected)


BAD = {
    "beyond 0 to 1": (np.full((40, 40, 3), 3.0), r"image 0: floats from 3 to 3; .* normalises itself"),
    "layout": (np.zeros((3, 40, 40), np.uint8), r"image 0: of shape \(3, 40, 40\); the model takes 3 channels"),
    "nothing in it": (np.zeros((0, 40, 3), np.uint8), "of shape"),
    "no file": ("nowhere.jpg", "image 0: nowhere.jpg: No such file"),
    "no images": ([], "no image to extract features from in 0 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_with_its_place(weights, name):
    images, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        dinov2.load(weights).embed(images)


def test_one_bad_image_among_good_ones_shifts_no_row(weights, paths):
    with pytest.raises(ValueError, match="image 1: "):
        dinov2.load(weights).embed([paths[0], Path("nowhere.jpg"), paths[1]])
    with pytest.raises(TypeError, match="a dict is no image"):
        dinov2.load(weights).embed([{}])
