import csv
import itertools
import sys

import numpy as np
import pytest
import torch

from dinov2.eval.features import FeatureTable
from dinov2.eval.visualize import (
    MissingExtra,
    attention_maps,
    choose_cells,
    draw_grid,
    find_label_issues,
    find_neighbours,
    fit_patch_pca,
    label_issues_of,
    main,
    overlay_heat,
    plot_attention_heads,
    plot_attention_tokens,
    plot_embedding,
    plot_label_issues,
    plot_neighbours,
    plot_pca,
    plot_typical,
    reduce_to_2d,
    save,
    typicality,
)
from dinov2.eval.visualize.figures import GridRow, Panel, group_styles, square
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import save_backbone


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def blobs(rng, per_class=20, classes=3, width=8, spread=0.25):
    """Rows around one corner per class, labels."""
    labels = np.repeat(np.arange(classes), per_class)
    centres = np.eye(classes, width) * 2
    return (centres[labels] + spread * rng.standard_normal((len(labels), width))).astype(np.float32), labels


def picture(rng, size=28):
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def texts_overlap(figure):
    """Pairs of texts of a drawn figure whose boxes intersect by more than a pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [text.get_window_extent(renderer).padded(-1) for text in texts]
    pairs = itertools.combinations(zip(texts, boxes), 2)
    return [(a.get_text(), b.get_text()) for (a, box), (b, other) in pairs if box.overlaps(other)]


# --------------------------------------------------------------------------- colours and grids


def test_every_group_has_a_colour_and_marker_of_its_own():
    names = [f"class {i}" for i in range(56)]
    assert len(set(group_styles(names).values())) == 56


def test_no_texts_of_a_grid_overlap_even_with_long_names(rng):
    panels = [Panel(picture(rng), "0.93 segmented_neutrophil_with_a_long_name", "red") for _ in range(4)]
    rows = [GridRow(panels, "segmented_neutrophil"), GridRow(panels[:2], "band_neutrophil of the second scanner")]
    titles = ["a rather long title of a column", "b", "c", "another rather long title"]
    figure = draw_grid(rows, column_titles=titles, title="A title that goes on and on " * 5, scale="what it means " * 8)
    assert texts_overlap(figure) == []


def test_the_middle_of_an_oblong_image_becomes_the_square():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (square(image, 10) == 200).all()


def test_heat_is_over_the_image_only_where_it_is_hot():
    image = np.full((8, 8, 3), 100, np.uint8)
    heat = np.array([[0.0, 0.0], [0.0, 1.0]])
    blended = overlay_heat(image, heat)
    np.testing.assert_allclose(blended[0, 0], 0.6 * 100 / 255, atol=0.01)  # the enlargement overshoots a little
    assert blended[-1, -1, 0] > 0.7


# --------------------------------------------------------------------------- maps


def test_pca_keeps_the_distances_of_points_in_a_plane(rng):
    features, _ = blobs(rng)
    points = reduce_to_2d(features, method="pca")
    from sklearn.decomposition import PCA

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = PCA(2).fit_transform(unit)
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-4)


@pytest.mark.slow
def test_umap_gives_equal_maps_for_equal_seeds_and_keeps_classes_together(rng):
    pytest.importorskip("umap")
    features, labels = blobs(rng)
    first, again, other = (reduce_to_2d(features, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    distance = np.linalg.norm(first[:, None] - first[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95
    assert reduce_to_2d(features[:5]).shape == (5, 2)


def test_a_missing_library_names_the_extra_to_install(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dinov2\[umap\]'"):
        reduce_to_2d(blobs(rng)[0])


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.ones((3, 4)), {}, "at least 4 images, got 3"),
        (np.full((5, 4), np.nan), {}, "5 rows of the features are not finite"),
        (np.ones((5, 4)), {"method": "tsne"}, "unknown method 'tsne'; known: umap, pca"),
    ],
)
def test_features_that_cannot_be_mapped_are_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        reduce_to_2d(features, **options)


def test_a_map_has_a_panel_per_grouping_and_names_every_group_with_its_count(rng):
    classes = ["basophil"] * 5 + ["blast"] * 7
    figure = plot_embedding(rng.random((12, 2)), {"class": classes, "source": ["a", "b"] * 6}, title="Cells")
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["basophil (5)", "blast (7)"], ["a (6)", "b (6)"]]
    assert texts_overlap(figure) == []
    with pytest.raises(ValueError, match="12 points but 2 names to colour them by 'class'"):
        plot_embedding(rng.random((12, 2)), {"class": ["a", "b"]})


# --------------------------------------------------------------------------- PCA of patches


@pytest.fixture
def tokens(rng):
    """Patch tokens of 3 images: background, a nucleus and cytoplasm around it; and where the cell is."""
    tokens = 0.05 * rng.standard_normal((3, 10, 10, 16)).astype(np.float32)
    cell = np.zeros((10, 10), bool)
    cell[3:7, 3:7] = True
    nucleus = np.zeros_like(cell)
    nucleus[4:6, 4:6] = True
    tokens[:, cell, 0] += 4
    tokens[:, nucleus, 1] += 2
    tokens[:, ~cell, 0] -= 1
    return tokens, cell, nucleus


def test_the_foreground_is_the_cell_in_the_middle_whatever_the_sign_of_the_features(tokens):
    tokens, cell, _ = tokens
    for sign in (1, -1):
        colours = fit_patch_pca(sign * tokens).transform(sign * tokens)
        np.testing.assert_array_equal(colours.foreground, np.broadcast_to(cell, (3, 10, 10)))


def test_equal_patches_have_equal_colours_in_every_image_and_parts_differ(tokens):
    tokens, cell, nucleus = tokens
    colours = fit_patch_pca(tokens).transform(tokens)
    inside, around = colours.rgb[:, nucleus], colours.rgb[:, cell & ~nucleus]
    assert inside[..., 0].std() < 0.1
    assert abs(inside[..., 0].mean() - around[..., 0].mean()) > 0.7
    assert colours.rgb.min() >= 0
    assert colours.rgb.max() <= 1


def test_the_basis_does_not_depend_on_the_order_of_the_images_and_fits_other_resolutions(tokens):
    tokens, cell, _ = tokens
    basis = fit_patch_pca(tokens)
    np.testing.assert_allclose(fit_patch_pca(tokens[::-1]).colours, basis.colours, atol=1e-4)
    finer = tokens.repeat(2, axis=1).repeat(2, axis=2)
    assert basis.transform(finer).foreground.sum() == 3 * 4 * cell.sum()


def test_patch_components_are_those_of_scikit_learn(tokens):
    from sklearn.decomposition import PCA

    tokens, cell, _ = tokens
    basis = fit_patch_pca(tokens)
    expected = PCA(3).fit(tokens[:, cell].reshape(-1, 16)).components_
    # only the first is well separated from noise
    np.testing.assert_allclose(abs(basis.colours[0] @ expected[0]), 1, atol=1e-3)
    assert (basis.colours[np.arange(3), np.abs(basis.colours).argmax(axis=1)] > 0).all()


def test_a_threshold_sets_how_much_is_foreground_and_may_not_leave_nothing(tokens):
    tokens, *_ = tokens
    some, more = (fit_patch_pca(tokens, threshold=t).transform(tokens).foreground.sum() for t in (1.0, -1.0))
    assert some < more
    with pytest.raises(ValueError, match=r"^0 patches are foreground .* lower threshold than"):
        fit_patch_pca(tokens, threshold=50.0)
    with pytest.raises(ValueError, match=r"expected patch tokens .* got \(3, 16\)"):
        fit_patch_pca(np.ones((3, 16)))


def test_the_pca_picture_has_rows_of_cells_masks_colours_and_overlays(tokens, rng):
    tokens, cell, _ = tokens
    colours = fit_patch_pca(tokens).transform(tokens)
    images = [picture(rng, 50) for _ in range(3)]
    figure = plot_pca(images, colours, names=["a", "b", "c"], title="PCA")
    assert len(figure.axes) == 4 * 3
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown[0], images[0])
    mask = cell.repeat(5, axis=0).repeat(5, axis=1)
    np.testing.assert_array_equal(shown[3][..., 0], mask)
    assert (shown[6][~mask] == 0).all()
    assert texts_overlap(figure) == []
    with pytest.raises(ValueError, match="2 images but colours of 3"):
        plot_pca(images[:2], colours)


# --------------------------------------------------------------------------- attention


def small_vit(backend="auto", registers=2, chunks=0):
    return DinoVisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=64,
        depth=4,
        num_heads=2,
        num_register_tokens=registers,
        init_values=1.0,
        block_chunks=chunks,
        attention_backend=backend,
    ).eval()


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("block", [0, 2, -1])
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("sdpa", "cpu", torch.float32),
        pytest.param("varlen", "cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_weighting_the_values_by_the_shown_attention_gives_what_the_block_computes(
    backend, device, dtype, block, chunks
):
    model = small_vit(backend, chunks=chunks).to(device, dtype)
    images = torch.randn(2, 3, 42, 56, device=device, dtype=dtype)
    attention = list(model.iterate_blocks())[block].attn
    seen = {}
    # the forward pass packs the tokens of all images in rows
    attention.register_forward_hook(lambda _, inputs, output: seen.update(input=inputs[0], output=output))
    with torch.no_grad():
        model(images)
        weights = model.get_self_attention(images, block)
        values = attention.qkv(seen["input"]).view(2, 1 + 2 + 12, 3, 2, 32)[:, :, 2].transpose(1, 2)
        mixed = (weights.to(dtype) @ values).transpose(1, 2).reshape(2 * 15, 64)
        expected = attention.proj(mixed)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(seen["output"].reshape(30, 64), expected, atol=tolerance, rtol=tolerance)

    maps = attention_maps(model, images, block)
    torch.testing.assert_close(torch.from_numpy(maps.cls.reshape(2, 2, 12)), weights[:, :, 0, 3:].float().cpu())
    torch.testing.assert_close(
        torch.from_numpy(maps.registers[:, 1].reshape(2, 2, 12)), weights[:, :, 2, 3:].float().cpu()
    )
    assert maps.cls.shape == (2, 2, 3, 4)
    assert maps.block == block % 4


def test_attention_of_a_model_without_registers_has_the_class_token_alone(rng):
    maps = attention_maps(small_vit(registers=0), torch.randn(1, 3, 28, 28))
    assert maps.registers.shape == (1, 0, 2, 2, 2)
    assert list(maps.tokens) == ["class token"]
    assert (maps.cls.sum(axis=(2, 3)) < 1).all()


def test_attention_refuses_blocks_and_sizes_that_do_not_exist():
    with pytest.raises(ValueError, match="block=4 does not exist; the model has blocks 0 to 3"):
        attention_maps(small_vit(), torch.randn(1, 3, 28, 28), block=4)
    with pytest.raises(ValueError, match="image_size=30 is not a multiple"):
        attention_maps(small_vit(), torch.randn(1, 3, 28, 30))


def test_attention_pictures_show_every_token_and_head_without_overlaps(rng):
    maps = attention_maps(small_vit(), torch.randn(2, 3, 28, 28), block=1)
    images = [picture(rng), picture(rng)]
    heads = plot_attention_heads(images[1], maps, 1)
    assert len(heads.axes) == 3 * (1 + 1 + 2) + 1  # tokens x (cell, mean, heads), and the scale
    many = plot_attention_tokens(images, maps, names=["a", "b"])
    assert len(many.axes) == 2 * (1 + 3) + 1
    for figure in (heads, many):
        assert texts_overlap(figure) == []
    with pytest.raises(ValueError, match="1 images but attention of 2"):
        plot_attention_tokens(images[:1], maps)


# --------------------------------------------------------------------------- neighbours and labels


@pytest.mark.parametrize("rows", [None, [3, 50, 7]])
def test_neighbours_are_those_of_brute_force_and_never_the_cell_itself(rng, rows):
    features, _ = blobs(rng)
    features[7] = features[3]  # a duplicate may not take the place of the query
    found, cosines = find_neighbours(features, 5, rows)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for query, neighbours, similar in zip(range(60) if rows is None else rows, found, cosines):
        others = np.delete(np.arange(60), query)
        expected = np.sort(unit[others] @ unit[query])[::-1][:5]
        np.testing.assert_allclose(similar, expected, atol=1e-5)
        assert query not in neighbours


def test_the_odd_one_of_a_class_is_the_one_that_lies_elsewhere(rng):
    features, labels = blobs(rng)
    features[4] = features[25]
    scores = typicality(features, labels)
    assert scores[:20].argmin() == 4
    assert np.isnan(typicality(features, np.arange(60))).all()


def test_typicality_leaves_the_row_itself_out():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    np.testing.assert_allclose(typicality(features, np.zeros(3, int)), [0.0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-6)


def test_exchanged_labels_are_found_and_their_class_suggested(rng):
    features, labels = blobs(rng, per_class=30)
    wrong = [2, 33, 70]
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1) % 3
    table = FeatureTable(features, given, [f"{i:03d}.png" for i in range(90)], ["a", "b", "c"])
    issues = label_issues_of(table)
    assert sorted(issues.rows) == wrong
    np.testing.assert_array_equal(issues.suggested, labels[issues.rows])


def test_label_issues_are_those_of_cleanlab(rng):
    cleanlab_filter = pytest.importorskip("cleanlab.filter")
    labels = rng.integers(0, 4, 300)
    probabilities = rng.dirichlet(np.ones(4), 300)
    probabilities[np.arange(300), labels] += rng.random(300)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    theirs = cleanlab_filter.find_label_issues(
        labels, probabilities, filter_by="confident_learning", return_indices_ranked_by="normalized_margin", n_jobs=1
    )
    ours = find_label_issues(probabilities, labels)
    assert len(theirs) > 10
    assert set(theirs) <= set(ours.rows)
    # theirs leaves out rows whose own label is the most probable one
    extra = sorted(set(ours.rows) - set(theirs))
    assert (probabilities[extra].argmax(axis=1) == labels[extra]).all()


def test_probabilities_that_do_not_fit_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"3 rows of probabilities but labels of shape \(2,\)"):
        find_label_issues(np.ones((3, 2)), np.zeros(2, int))
    with pytest.raises(ValueError, match="labels from -1 to 1 for 2 classes"):
        find_label_issues(np.ones((2, 2)), np.array([-1, 1]))


def test_pictures_of_neighbours_typical_cells_and_labels_have_no_overlaps(rng, tmp_path):
    features, labels = blobs(rng)
    classes = ["segmented_neutrophil", "lymphocyte", "b"]
    names = [classes[label] for label in labels]
    read = lambda row: picture(rng)  # noqa: E731
    found, cosines = find_neighbours(features, 6, [0, 20])
    given = labels.copy()
    given[:2] = 1
    issues = label_issues_of(FeatureTable(features, given, [f"{i:02d}" for i in range(60)], classes))
    figures = [
        plot_neighbours(read, [0, 20], found, cosines, names),
        plot_typical(read, features, labels, classes),
        plot_label_issues(read, issues, given, classes),
    ]
    for index, figure in enumerate(figures):
        assert texts_overlap(figure) == []
        assert save(figure, tmp_path / "new folder" / f"{index}.png").stat().st_size > 5000


# --------------------------------------------------------------------------- choice of cells, command line


def test_cells_are_chosen_from_all_classes_in_turn():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    chosen = choose_cells(labels, 8)
    assert len(set(chosen.tolist())) == 8
    assert np.bincount(labels[chosen]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert len(set(labels[choose_cells(labels, 2)])) == 2
    np.testing.assert_array_equal(choose_cells(labels, 8), chosen)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "backbone.safetensors"
    torch.manual_seed(0)
    save_backbone(small_vit(), path)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["umap", "--method", "pca"],
        ["pca", "--count", "3"],
        ["attention", "--count", "2", "--block", "1"],
        ["attention", "--count", "1", "--heads"],
        ["neighbors", "--k", "3"],
        ["neighbors", "--show", "typical"],
    ],
    ids=" ".join,
)
def test_every_kind_of_picture_is_one_command(arguments, weights, cell_folder, tmp_path, capsys):
    out = tmp_path / "picture.png"
    data = ["--weights", weights, "--data", str(cell_folder), "--image-size", "28", "--dpi", "60"]
    assert main([*arguments, *data, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(out)


def test_label_issues_come_with_a_csv_file_and_tables_can_be_read_from_a_file(cell_folder, tmp_path, rng):
    features, labels = blobs(rng, per_class=8, classes=4)
    paths = sorted(map(str, cell_folder.rglob("*.jpg")))
    labels[0] = 1
    table = FeatureTable(features, labels, paths, ["a", "b", "c", "d"])
    table.save(tmp_path / "table.npz")
    out = tmp_path / "labels.png"
    assert main(["neighbors", "--show", "labels", "--embeddings", str(tmp_path / "table.npz"), "--out", str(out)]) == 0
    (row,) = csv.DictReader((tmp_path / "labels.csv").open())
    assert (row["path"], row["given"], row["suggested"]) == (paths[0], "b", "a")


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_what_dinov2_embed_wrote_is_drawn(suffix, weights, cell_folder, tmp_path):
    from dinov2.eval import embed

    table, out = str(tmp_path / f"table{suffix}"), str(tmp_path / "x.png")
    assert not embed.main(["--weights", weights, "--data", str(cell_folder), "--out", table, "--image-size", "28"])
    assert main(["umap", "--method", "pca", "--embeddings", table, "--out", out, "--dpi", "50"]) == 0
    assert main(["neighbors", "--k", "2", "--embeddings", table, "--out", out, "--dpi", "50"]) == 0


def test_images_without_classes_can_be_shown_too(weights, cell_folder, tmp_path):
    data = ["--weights", weights, "--data", str(cell_folder), "--unlabelled", "--image-size", "28", "--dpi", "50"]
    for kind in (["umap", "--method", "pca"], ["attention", "--count", "2"]):
        assert main([*kind, *data, "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["umap"], "give either --embeddings FILE, or --weights FILE and --data FOLDER"),
        (["umap", "--embeddings", "missing.npz"], "no embeddings at missing.npz"),
        (["pca", "--weights", "{weights}", "--data", "{data}", "--images", "no.jpg"], "no.jpg is not in the data"),
        (
            ["pca", "--weights", "{weights}", "--data", "{data}", "--image-size", "30"],
            "image_size=30 is not a multiple",
        ),
        (["pca", "--weights", "{weights}", "--data", "{data}", "--count", "0"], "--count must be at least 1, got 0"),
    ],
)
def test_mistakes_are_explained(arguments, message, weights, cell_folder, tmp_path):
    arguments = [word.format(weights=weights, data=cell_folder) for word in arguments]
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--out", str(tmp_path / "x.png")])
