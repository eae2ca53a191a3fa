"""Sinkhorn-Knopp against the alternating normalisation written in probability space, in float64."""

import numpy as np
import torch

from dinov2.loss.sinkhorn import sinkhorn_knopp


def alternate_normalisation(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    q = np.exp(logits.astype(np.float64) / temperature)
    for _ in range(iterations):
        q = q / q.sum(axis=0) / q.shape[1]  # every prototype gets an equal share of the mass
        q = q / q.sum(axis=1, keepdims=True) / q.shape[0]  # every sample, too
    return q * q.shape[0]


def test_it_is_the_alternating_normalisation_of_the_paper():
    logits = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    expected = alternate_normalisation(logits.numpy(), 0.05, 3)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_every_row_is_a_distribution_and_many_iterations_balance_the_prototypes():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 0.2
    q = sinkhorn_knopp(logits, 0.1, n_iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)


def test_half_precision_logits_are_normalised_in_float32():
    q = sinkhorn_knopp(torch.ones(4, 8, dtype=torch.bfloat16), 0.04)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, torch.full((4, 8), 1 / 8))


def test_no_samples_give_no_rows():
    assert sinkhorn_knopp(torch.empty(0, 8), 0.07, n_samples=0).shape == (0, 8)
