import itertools
import runpy
import urllib.error
from pathlib import Path

import pytest
import torch

import dinov2
from dinov2.hub import backbones, classifiers
from dinov2.hub.backbones import load_backbone
from dinov2.hub.utils import CenterPadding
from dinov2.models.vision_transformer import DinoVisionTransformer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr("torch.hub.urlopen", refuse)


def test_hubconf_offers_every_backbone_and_classifier_without_a_network(offline):
    entries = runpy.run_path(str(ROOT / "hubconf.py"))
    for size, registers, head in itertools.product("sblg", ("", "_reg"), ("", "_lc")):
        assert callable(entries[f"dinov2_vit{size}14{registers}{head}"])
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), "dinov2_vits14_reg", source="local", pretrained=False)
    assert model.num_register_tokens == 4
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)


def test_without_a_network_the_error_says_which_file_goes_where(offline, torch_home):
    expected = torch_home / "dinov2_vits14_reg4_pretrain.pth"
    with pytest.raises(ConnectionError, match=f"place it at {expected}"):
        load_backbone("dinov2_vits14_reg")


def test_a_named_model_is_read_from_the_cache_of_torch_hub(offline, torch_home):
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in backbones.dinov2_vits14(pretrained=False).state_dict().items()}
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in names.items()}
    torch_home.mkdir(parents=True)
    torch.save(tensors, torch_home / "dinov2_vits14_pretrain.pth")
    by_name = load_backbone("dinov2_vits14")
    by_function = backbones.dinov2_vits14().eval()
    image = torch.randn(1, 3, 70, 70)
    torch.testing.assert_close(by_name(image), by_function(image))
    assert by_name.pos_embed.shape == (1, 1370, 384)


def test_a_damaged_file_in_the_cache_is_named(offline, torch_home):
    torch_home.mkdir(parents=True)
    (torch_home / "dinov2_vits14_pretrain.pth").write_bytes(b"<html>proxy error</html>")
    with pytest.raises(ValueError, match=r"dinov2_vits14_pretrain\.pth: not a readable weights file"):
        load_backbone("dinov2_vits14")


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_unknown_weights_are_refused_with_the_known_ones(error):
    with pytest.raises(error, match="weights='NOPE' are unknown; choose one of LVD142M"):
        backbones.dinov2_vits14(pretrained=False, weights="NOPE")
    with pytest.raises(error, match="layers=2"):
        classifiers.dinov2_vits14_lc(pretrained=False, layers=2)


@pytest.mark.parametrize("layers", [1, 4])
def test_classifiers_read_class_tokens_and_the_mean_patch(layers):
    backbone = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=4, num_heads=2).eval()
    head = torch.nn.Linear((1 + layers) * 16, 5)
    model = classifiers._LinearClassifierWrapper(backbone=backbone, linear_head=head, layers=layers)
    image = torch.randn(2, 3, 28, 28)
    outputs = backbone.get_intermediate_layers(image, n=layers, return_class_token=True)
    parts = [token for _, token in outputs] + [outputs[-1][0].mean(1)]
    torch.testing.assert_close(model(image), head(torch.cat(parts, dim=1)))


def test_center_padding_makes_both_sides_multiples_and_keeps_the_middle():
    image = torch.arange(1.0, 16.0).view(1, 1, 3, 5)
    padded = CenterPadding(4)(image)
    assert padded.shape == (1, 1, 4, 8)
    assert torch.equal(padded[:, :, 0:3, 1:6], image)
    assert padded.sum() == image.sum()


def test_load_is_one_line(tmp_path, tiny_vit):
    from dinov2.models.weights import save_backbone

    save_backbone(tiny_vit, tmp_path / "backbone.safetensors")
    model = dinov2.load(tmp_path / "backbone.safetensors")
    image = torch.randn(1, 3, 56, 56)
    assert torch.equal(model(image), tiny_vit(image))
    assert not any(parameter.requires_grad for parameter in model.parameters())
