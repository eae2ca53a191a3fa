"""The projection head that turns tokens into prototype scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """A linear map without bias whose row `k` is `weight_g[k] * weight_v[k] / |weight_v[k]|`.

    It has the parameter names of DINOv2's checkpoints, which PyTorch's current weight norm no longer writes.

    Source: Salimans and Kingma, "Weight normalization", NeurIPS 2016.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit lengths, random directions."""
        nn.init.ones_(self.weight_g)
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    @property
    def weight(self) -> Tensor:
        """The normalised matrix `(out_features, in_features)`."""
        return self.weight_g * F.normalize(self.weight_v, dim=1, eps=_eps(self.weight_v))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.weight)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, then scores against `out_dim` prototypes of unit length.

    Args:
        in_dim: width of a token.
        out_dim: prototypes.
        use_bn: batch normalisation after each hidden layer.
        nlayers: linear layers of the MLP; below 1 counts as 1.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the normalised space.
        mlp_bias: biases in the MLP.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _build_mlp(max(nlayers, 1), in_dim, bottleneck_dim, hidden_dim, use_bn, mlp_bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal weights (standard deviation 0.02), zero biases, prototypes of unit length."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()
        self.last_layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(rows, in_dim)` to scores `(rows, out_dim)`, cosines while `weight_g` is 1."""
        x = self.mlp(x)
        return self.last_layer(F.normalize(x, dim=-1, eps=_eps(x)))


def _eps(x: Tensor) -> float:
    return 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 is zero in float16


def _build_mlp(nlayers: int, in_dim: int, out_dim: int, hidden_dim: int, use_bn: bool, bias: bool) -> nn.Module:
    if nlayers == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    layers: list[nn.Module] = []
    for width in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim, bias=bias))
