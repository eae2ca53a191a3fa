import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import DINOHead


def head(**options):
    return DINOHead(in_dim=24, out_dim=40, hidden_dim=32, bottleneck_dim=16, **options)


def test_keys_and_shapes_are_those_of_released_heads():
    shapes = {name: tuple(tensor.shape) for name, tensor in head().state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (32, 24),
        "mlp.0.bias": (32,),
        "mlp.2.weight": (32, 32),
        "mlp.2.bias": (32,),
        "mlp.4.weight": (16, 32),
        "mlp.4.bias": (16,),
        "last_layer.weight_g": (40, 1),
        "last_layer.weight_v": (40, 16),
    }


def test_scores_are_cosines_with_the_prototypes():
    module = head()
    x = torch.randn(6, 24)
    expected = F.cosine_similarity(module.mlp(x).unsqueeze(1), module.last_layer.weight_v.unsqueeze(0), dim=-1)
    torch.testing.assert_close(module(x), expected)


def test_the_last_layer_equals_torchs_weight_norm_gradients_included():
    module = head().double()
    with torch.no_grad():
        module.last_layer.weight_g.uniform_(0.5, 2.0)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 40, bias=False).double())
    reference.parametrizations.weight.original0.data = module.last_layer.weight_g.data.clone()
    reference.parametrizations.weight.original1.data = module.last_layer.weight_v.data.clone()
    x = torch.randn(5, 16, dtype=torch.float64)
    ours, theirs = module.last_layer(x), reference(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(module.last_layer.weight_v.grad, reference.parametrizations.weight.original1.grad)
    torch.testing.assert_close(module.last_layer.weight_g.grad, reference.parametrizations.weight.original0.grad)


@pytest.mark.parametrize(("nlayers", "linears"), [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_nlayers_counts_linear_layers_of_the_mlp(nlayers, linears):
    assert sum(isinstance(m, torch.nn.Linear) for m in head(nlayers=nlayers).mlp.modules()) == linears


def test_batch_norm_and_biases_are_optional():
    assert "mlp.1.running_mean" in head(use_bn=True).state_dict()
    assert "mlp.0.bias" not in head(mlp_bias=False).state_dict()


def test_a_zero_token_gives_finite_scores_in_half_precision_too():
    module = head()
    assert torch.isfinite(module(torch.zeros(2, 24))).all()
    half = head(mlp_bias=False).half()
    assert torch.isfinite(half(torch.zeros(2, 24).half())).all()
    assert half(torch.randn(2, 24).half()).dtype == torch.float16
