import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dinov2.hub.backbones import load_backbone
from dinov2.layers import DINOHead
from dinov2.models.architecture import build_backbone, describe_backbone, infer_architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import (
    backbone_state_dict,
    load_pretrained_weights,
    load_weights,
    read_state_dict,
    save_backbone,
)


def small(**options) -> DinoVisionTransformer:
    """64 wide, so that one head of 64 channels is what shapes let one infer."""
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 1, **options}
    model = DinoVisionTransformer(**{"init_values": 1.0, "block_chunks": 0, "num_register_tokens": 2, **options})
    with torch.no_grad():
        for parameter in model.parameters():  # every tensor must matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prefixed(prefix: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


LAYOUTS = {
    "plain": lambda m: m.state_dict(),
    "teacher_checkpoint": lambda m: {
        "teacher": {**prefixed("backbone.", m), "dino_head.mlp.0.weight": torch.zeros(3, 3)}
    },
    "model": lambda m: {
        "model": m.state_dict(),
        "iteration": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    },
    "state_dict": lambda m: {"state_dict": prefixed("module.", m), "epoch": 3},
    "module.backbone": lambda m: prefixed("module.backbone.", m),
    "teacher.backbone": lambda m: prefixed("teacher.backbone.", m),
    "student": lambda m: prefixed("student.", m),
    "compiled": lambda m: prefixed("_orig_mod.backbone._orig_mod.", m),
    "compiled blocks": lambda m: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in m.state_dict().items()
    },
    "student and teacher": lambda m: {
        "model": {**prefixed("student.backbone.", small()), **prefixed("teacher.backbone.", m)}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [0, 2], ids=["plain blocks", "chunked blocks"])
def test_every_layout_loads_to_the_same_features(layout, chunks, tmp_path):
    model = small(block_chunks=chunks)
    torch.save(LAYOUTS[layout](model), tmp_path / "weights.pth")
    image = torch.randn(2, 3, 56, 56)
    expected = model(image)
    assert torch.equal(load_backbone(tmp_path / "weights.pth")(image), expected)
    for target_chunks in (0, 2):
        target = small(block_chunks=target_chunks)
        report = load_weights(target, tmp_path / "weights.pth")
        assert torch.equal(target(image), expected)
        assert report.missing == []
        assert len(report.matched) == len(target.state_dict())


@pytest.mark.parametrize("name", ["backbone.pth", "backbone.safetensors"])
def test_a_saved_backbone_needs_only_its_file(name, tmp_path):
    """12 channels, one head of 96, filtered positions: none of it can be read from shapes alone."""
    model = small(embed_dim=96, in_chans=12, block_chunks=2, interpolate_antialias=True, interpolate_offset=0.0)
    save_backbone(model, tmp_path / name, {"optim": {"epochs": 3}})
    loaded = load_backbone(tmp_path / name)
    image = torch.randn(1, 12, 84, 84)
    assert torch.equal(loaded(image), model(image))
    assert not loaded.training
    assert read_state_dict(tmp_path / name).config["run"] == {"optim": {"epochs": 3}}
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_saved_backbone_has_plain_hub_names_that_load_strictly(tmp_path):
    save_backbone(small(block_chunks=2), tmp_path / "backbone.pth")
    tensors = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert list(tensors) == list(small(block_chunks=0).state_dict())
    small().load_state_dict(tensors, strict=True)


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused", "identity"])
@pytest.mark.parametrize("bare", [False, True])
def test_the_architecture_is_read_from_the_shapes(ffn_layer, bare):
    options = {"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "init_values": None} if bare else {}
    model = small(ffn_layer=ffn_layer, num_register_tokens=0 if bare else 2, **options)
    rebuilt = build_backbone(infer_architecture(model.state_dict()))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(1, 3, 84, 84)
    assert torch.equal(rebuilt.eval()(image), model(image))
    assert describe_backbone(model)["num_heads"] == 1


@pytest.mark.parametrize(
    ("registers", "positions", "antialias", "offset"),
    [(0, 1370, False, 0.1), (4, 1370, True, 0.0), (4, 257, False, 0.1), (0, 257, False, 0.1)],
)
def test_released_and_trained_files_interpolate_positions_as_they_were_trained(registers, positions, antialias, offset):
    with torch.device("meta"):
        img_size = {1370: 518, 257: 224}[positions]
        model = DinoVisionTransformer(
            img_size=img_size, patch_size=14, embed_dim=384, num_heads=6, block_chunks=0, num_register_tokens=registers
        )
    found = infer_architecture(model.state_dict())
    assert (found["arch"], found["img_size"], found["num_register_tokens"]) == ("vit_small", img_size, registers)
    assert (found["interpolate_antialias"], found["interpolate_offset"]) == (antialias, offset)


@pytest.mark.parametrize(("old", "new"), [(56, 112), (112, 56)])
@pytest.mark.parametrize("options", [{}, {"interpolate_antialias": True, "interpolate_offset": 0.0}])
def test_positions_resized_on_load_are_those_the_model_would_have_used_at_that_size(old, new, options):
    source, target = small(img_size=old, **options), small(img_size=new, **options)
    report = load_weights(target, source.state_dict())
    assert list(report.resized) == ["pos_embed"]
    image = torch.randn(1, 3, new, new)
    torch.testing.assert_close(target(image), source(image), atol=1e-5, rtol=1e-5)


def test_positions_without_a_class_token_get_a_zero_one():
    model = small()
    tensors = model.state_dict()
    with torch.no_grad():
        model.pos_embed[:, 0] = 0
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    target = small()
    load_weights(target, tensors)
    image = torch.randn(1, 3, 56, 56)
    assert torch.equal(target(image), model(image))


def test_a_model_with_registers_starts_them_anew_and_says_so(caplog):
    target = small()
    before = target.register_tokens.clone()
    with caplog.at_level("INFO", logger="dinov2"):
        report = load_weights(target, small(num_register_tokens=0).state_dict())
    assert report.missing == ["register_tokens"]
    assert torch.equal(target.register_tokens, before)
    assert "missing: register_tokens" in caplog.text


def test_registers_that_the_model_lacks_are_warned_about(caplog):
    report = load_weights(small(num_register_tokens=0), small().state_dict())
    assert report.unexpected == ["register_tokens"]
    assert "was trained with registers" in caplog.text


def test_another_patch_size_gives_the_same_tokens_for_enlarged_images():
    """An image enlarged by two, read with patches twice as large, looks the same to the model."""
    source, target = small(img_size=32, patch_size=8), small(img_size=64, patch_size=16)
    report = load_weights(target, source.state_dict())
    assert "patch_embed.proj.weight" in report.resized
    image = torch.randn(1, 3, 32, 32)
    larger = torch.stack(
        [
            torch.nn.functional.interpolate(
                image[:, :, r : r + 8, c : c + 8], size=(16, 16), mode="bicubic", antialias=True
            )
            for r in range(0, 32, 8)
            for c in range(0, 32, 8)
        ]
    ).unflatten(0, (4, 4))
    larger = larger.permute(2, 3, 0, 4, 1, 5).reshape(1, 3, 64, 64)
    torch.testing.assert_close(target.patch_embed(larger), source.patch_embed(image), atol=1e-4, rtol=1e-4)


def test_more_channels_keep_the_answer_to_gray_images():
    source, target = small(in_chans=3), small(in_chans=5)
    load_weights(target, source.state_dict())
    gray = torch.randn(1, 1, 56, 56)
    torch.testing.assert_close(target(gray.expand(-1, 5, -1, -1)), source(gray.expand(-1, 3, -1, -1)))


def test_what_is_absent_but_neutral_is_set_to_do_nothing():
    source = small(init_values=None, qkv_bias=False)
    target = small()
    report = load_weights(target, source.state_dict())
    image = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(target(image), source(image))
    assert report.initialised["blocks.0.ls1.gamma"] == "not in the file, set to 1.0"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ffn_layer": "swiglufused"}, "ffn_layer: mlp in the file, swiglufused in the model"),
        (
            {"embed_dim": 128},
            "arch: unnamed .2 blocks, 64 wide. in the file, unnamed .2 blocks, 128 wide",
        ),
        ({"depth": 3}, "arch: unnamed .2 blocks"),
        ({"qkv_bias": False}, "qkv_bias: True in the file, False in the model"),
        ({"init_values": None}, "layerscale: used in the file, not used in the model"),
    ],
)
def test_another_architecture_is_refused_and_the_option_named(options, named, tmp_path):
    torch.save(small().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth: weights of another architecture(?s:.*){named}"):
        load_weights(small(**options), tmp_path / "weights.pth")


def test_a_file_where_nothing_fits_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: nothing fits. The file has conv1.weight"):
        load_weights(small(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"no backbone among the 1 tensors: conv1\.weight"):
        load_backbone(tmp_path / "resnet.pth")


def test_heads_and_whole_students_load_too():
    parts = {"backbone": small(), "dino_head": DINOHead(64, 10, hidden_dim=8, bottleneck_dim=4)}
    whole = torch.nn.ModuleDict(parts)
    file = {"teacher": whole.state_dict()}
    other = torch.nn.ModuleDict({"backbone": small(), "dino_head": DINOHead(64, 10, hidden_dim=8, bottleneck_dim=4)})
    assert load_weights(other, file).missing == []
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))
    head = DINOHead(64, 10, hidden_dim=8, bottleneck_dim=4)
    load_weights(head, file)
    assert torch.equal(head.last_layer.weight_v, whole["dino_head"].last_layer.weight_v)


def test_the_checkpoint_key_chooses_among_several(tmp_path):
    student, teacher = small(), small()
    path = tmp_path / "checkpoint.pth"
    torch.save({"student": prefixed("backbone.", student), "teacher": prefixed("backbone.", teacher)}, path)
    target = small()
    load_pretrained_weights(target, path, "student")
    assert torch.equal(target.cls_token, student.cls_token)
    load_pretrained_weights(target, path, None)
    assert torch.equal(target.cls_token, teacher.cls_token)


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_pickle_is_refused_and_never_run(nested, tmp_path):
    content = Malicious(str(tmp_path / "ran"))
    content = {"teacher": small().state_dict(), "extra": content} if nested else content
    torch.save(content, tmp_path / "weights.pth")
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(content))
    for name in ("weights.pth", "weights.bin"):
        with pytest.raises(ValueError, match=f"{name}: not a readable weights file") as caught:
            load_backbone(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # no advice to load it unsafely
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_truncated_and_fuzzed_files_are_clear_errors(name, tmp_path):
    path = tmp_path / name
    save_backbone(small(), path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for length in (0, 1, 7, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_backbone(path)
    for _ in range(40):  # noise in the head and the tail, where the structure is
        noisy = bytearray(whole)
        for position in torch.randint(0, 600, (8,), generator=generator).tolist():
            noisy[position] = (noisy[position] + 1 + position) % 256
            noisy[-1 - position] = (noisy[-1 - position] + 1 + position) % 256
        path.write_bytes(noisy)
        assert _error_of(path) is None or str(path) in _error_of(path)


def _error_of(path: Path) -> str | None:
    """The message of the refusal, if it is one; noise that hits numbers only goes unseen."""
    try:
        load_backbone(path)
    except ValueError as error:
        return str(error)
    return None


def test_a_missing_file_says_what_may_be_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere.pth; give a file.*dinov2_vits14_reg"):
        load_backbone(tmp_path / "nowhere.pth")


def test_a_folder_may_hold_one_or_several_safetensors_files(tmp_path):
    tensors = small().state_dict()
    names = list(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in files.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(backbone_state_dict(read_state_dict(tmp_path).state_dict)) == set(names)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"the folder has none of model\.safetensors"):
        read_state_dict(tmp_path)


def test_half_precision_files_load_as_float32(tmp_path):
    model = small().half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    loaded = load_backbone(tmp_path / "half.pth")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
