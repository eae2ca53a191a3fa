import hashlib
import itertools
import json
import shutil
import sys

import pytest
import safetensors.torch
import torch

from dinov2.hub.backbones import load_backbone
from dinov2.hub.export import TARGETS, compare, export, get_args_parser, main
from dinov2.hub.export.model_card import USE
from dinov2.hub.export.onnx import positions_of_any_size
from dinov2.models.architecture import build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import save_backbone

LIBRARIES = {"hf": "transformers", "timm": "timm", "onnx": "onnxruntime", "onnx-any-size": "onnxruntime"}


def need(target: str) -> None:
    if target in LIBRARIES:
        pytest.importorskip(LIBRARIES[target])
    if target.startswith("onnx"):
        pytest.importorskip("onnxscript")


def noisy(model: DinoVisionTransformer) -> DinoVisionTransformer:
    with torch.no_grad():
        for parameter in model.parameters():  # every tensor must matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def small(**options) -> DinoVisionTransformer:
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, **options}
    return noisy(DinoVisionTransformer(**{"init_values": 1.0, "block_chunks": 0, "num_register_tokens": 4, **options}))


@pytest.mark.parametrize("target", ["hub", "safetensors", "hf", "timm"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@pytest.mark.parametrize("chunks", [0, 2])
def test_an_export_gives_the_same_features_there_and_back(target, registers, ffn_layer, chunks, tmp_path):
    need(target)
    model = small(num_register_tokens=registers, ffn_layer=ffn_layer, block_chunks=chunks)
    result = export(model, target, tmp_path)
    assert result.max_difference <= 1e-5
    source = tmp_path if target in ("hf", "timm") else result.files[0]
    image = torch.randn(2, 3, 84, 84)  # not the size that the positions are for
    torch.testing.assert_close(load_backbone(source)(image), model(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["onnx", "torch-export"])
def test_a_traced_program_takes_any_batch_size(target, tmp_path):
    need(target)
    model = small(depth=1)
    export(model, target, tmp_path)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 56, 56)
        expected = model.forward_features(images)
        if target == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
            found = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
        else:
            found = torch.export.load(tmp_path / "model.pt2").module()(images)
        torch.testing.assert_close(found[0], expected["x_norm_clstoken"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], expected["x_norm_patchtokens"], atol=1e-4, rtol=1e-4)


INTERPOLATIONS = [(False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)]


@pytest.mark.parametrize(("antialias", "offset"), INTERPOLATIONS)
def test_positions_as_matrix_products_are_those_of_the_model(antialias, offset):
    model = small(depth=1, img_size=98, interpolate_antialias=antialias, interpolate_offset=offset)
    tokens = torch.zeros(1, 1, 48)
    for height, width in ((98, 98), (98, 112), (112, 98), (42, 56), (28, 280), (518, 518)):
        expected = model.interpolate_pos_encoding(tokens, height, width)
        found = positions_of_any_size(model, tokens, height, width)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.1), (True, 0.0)])
def test_an_onnx_graph_of_any_size_gives_the_features_of_the_model_at_each(antialias, offset, tmp_path):
    need("onnx")
    import onnxruntime

    model = small(depth=1, interpolate_antialias=antialias, interpolate_offset=offset)
    assert export(model, "onnx-any-size", tmp_path).max_difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 56, 56), (2, 3, 28, 98), (5, 3, 224, 140)):
        images = torch.randn(shape)
        expected = model.forward_features(images)
        cls_token, patch_tokens = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(cls_token), expected["x_norm_clstoken"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(patch_tokens), expected["x_norm_patchtokens"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_folder_that_transformers_wrote_loads(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_backbone(tmp_path)
    assert ours.num_heads == 4  # not 48 / 64: read from config.json
    images = torch.randn(2, 3, 56, 56)
    features = ours.forward_features(images)
    tokens = torch.cat(
        [features[f"x_norm_{part}"].view(2, -1, 48) for part in ("clstoken", "regtokens", "patchtokens")], 1
    )
    with torch.no_grad():
        torch.testing.assert_close(tokens, theirs(images).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"])
def test_a_state_dict_of_timm_loads(name, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, depth=2, img_size=56, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    features = load_backbone(tmp_path / "timm.pth").forward_features(images)
    torch.testing.assert_close(features["x_norm_clstoken"], expected[:, 0], atol=1e-5, rtol=1e-5)
    patches = expected[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(features["x_norm_patchtokens"], patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["hf", "timm"])
def test_models_without_biases_or_layer_scale_are_completed(target, tmp_path):
    need(target)
    model = small(init_values=None, qkv_bias=False, proj_bias=False, ffn_bias=False, patch_size=8, in_chans=4)
    assert export(model, target, tmp_path).max_difference <= 1e-5


def test_an_export_past_the_tolerance_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def distort(model, path, config):
        broken = model.state_dict() | {"norm.weight": 1.01 * model.norm.weight}
        torch.save(broken, path)

    monkeypatch.setattr("dinov2.hub.export.plain.save_backbone", distort)
    with pytest.raises(ValueError, match="export to hub refused: features differ by"):
        export(small(embed_dim=64, num_heads=1), "hub", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_numbers_are_refused(tmp_path):
    model = small()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="differ by nan"):
        export(model, "hub", tmp_path)


def test_the_difference_is_relative_to_large_features_only():
    one = (torch.tensor([0.5]), torch.tensor([0.0]))
    far = (torch.tensor([0.6]), torch.tensor([0.0]))
    images = torch.zeros(1)
    assert compare(lambda _: one, lambda _: far, images) == pytest.approx(0.1)
    large = tuple(10 * part for part in one), tuple(10 * part for part in far)
    assert compare(lambda _: large[0], lambda _: large[1], images) == pytest.approx(0.2)


def test_blocks_without_a_feed_forward_network_have_no_place_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="ffn_layer='identity'"):
        export(small(ffn_layer="identity"), "timm", tmp_path)


def test_a_missing_library_says_which_extra_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'dinov2\[export\]'"):
        export(small(), "hf", tmp_path)


def test_the_command_writes_files_and_a_model_card_that_says_where_they_come_from(tmp_path, capsys):
    run = tmp_path / "run"
    config = {
        "train": {"dataset_path": ["/data/site_a", "/data/site_b"], "path_preserved": ["/data/site_a"], "frac": 0.1},
        "student": {"pretrained_weights": "dinov2_vits14"},
        "optim": {"epochs": 7},
    }
    save_backbone(small(), run / "eval" / "training_9" / "teacher_backbone.pth", config)
    (run / "eval_metrics.json").write_text('{"iteration": 4, "knn": 0.2}\n{"iteration": 9, "knn": 0.875}\n')
    (tmp_path / "images.csv").write_text("path\n")
    out = tmp_path / "out"
    weights = str(run / "eval" / "training_9" / "teacher_backbone.pth")
    arguments = ["--weights", weights, "--to", "safetensors", "--out", str(out), "--license", "apache-2.0"]
    assert main([*arguments, "--image-size", "84", "--data", str(tmp_path / "images.csv")]) == 0
    assert "largest difference 0.00e+00" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for expected in (
        "license: apache-2.0",
        "`/data/site_a`",
        "dinov2_vits14",
        "| knn | 0.875 |",
        "| `optim.epochs` | 7 |",
        "positions for 84 pixel images",
        "images.csv | 5 | " + hashlib.sha256(b"path\n").hexdigest(),
    ):
        assert expected in card
    assert load_backbone(out / "model.safetensors").pos_embed.shape[1] == 1 + 36
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dinov2_config"])["run"] == config


def test_every_format_says_in_its_model_card_how_to_use_it():
    assert set(USE) == set(TARGETS)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--weights", "w", "--out", "o", "--to", "tensorflow"])
    assert "torch-export" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--to tensorflow is unknown; choose one of hub"):
        export(small(), "tensorflow", tmp_path)


EVERY_PAIR = (
    *("hub", "hf", "hub", "timm", "hub", "safetensors", "hf"),
    *("timm", "hf", "safetensors", "timm", "safetensors", "hub"),
)
ROUND_TRIPS = list(itertools.permutations(("hub", "safetensors", "hf", "timm"), 2))


@pytest.mark.parametrize("pair", ROUND_TRIPS, ids="-".join)
def test_every_pair_of_formats_can_follow_each_other(pair, tmp_path):
    check_chain(small(), pair, tmp_path)


def check_chain(model: DinoVisionTransformer, targets, folder) -> None:
    """Export to the first format, load that and export to the next, ...; the last has the features of the model."""
    source = model
    for step, target in enumerate(targets):
        need(target)
        result = export(source, target, folder / str(step))
        source = load_backbone(folder / str(step) if target in ("hf", "timm") else result.files[0])
        shutil.rmtree(folder / str(step))  # a large model in six formats is 7 GB
    image = torch.randn(1, 3, 98, 98)
    torch.testing.assert_close(source(image), model(image), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "vit_large"])
@pytest.mark.parametrize(
    ("registers", "ffn_layer", "chunks"), [(0, "mlp", 0), (4, "mlp", 4), (0, "swiglufused", 4), (4, "swiglufused", 0)]
)
def test_round_trips_of_released_sizes(arch, registers, ffn_layer, chunks, tmp_path):
    options = {"img_size": 98, "patch_size": 14, "num_register_tokens": registers, "ffn_layer": ffn_layer}
    model = noisy(build_backbone({"arch": arch, "init_values": 1.0, "block_chunks": chunks, **options}))
    assert set(itertools.pairwise(EVERY_PAIR)) == set(ROUND_TRIPS)
    check_chain(model, EVERY_PAIR, tmp_path)
    for target in ("onnx", "onnx-any-size", "torch-export"):
        need(target)
        assert export(model, target, tmp_path / target).max_difference < TARGETS[target].tolerance
        shutil.rmtree(tmp_path / target)
