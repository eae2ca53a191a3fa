"""Loss scaling: down by half at once, up by two after many good steps."""

import torch

from dinov2.fsdp import ShardedGradScaler

CPU = torch.device("cpu")


def test_the_scale_halves_on_overflow_and_doubles_after_the_interval():
    scaler = ShardedGradScaler(CPU, enabled=True, init_scale=8.0, growth_interval=3)
    assert scaler.scale(torch.tensor(2.0)) == 16
    scaler.update(torch.tensor(1.0))
    assert scaler.scale_factor == 4
    for _ in range(3):
        scaler.update(torch.tensor(0.0))
    assert scaler.scale_factor == 8
    assert scaler.good_steps == 0


def test_switched_off_it_changes_nothing():
    scaler = ShardedGradScaler(CPU, enabled=False)
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss
    scaler.update(torch.tensor(1.0))
    assert scaler.scale_factor == 1


def test_its_state_survives_a_checkpoint():
    scaler, other = (ShardedGradScaler(CPU, enabled=True) for _ in range(2))
    scaler.update(torch.tensor(1.0))
    other.load_state_dict(scaler.state_dict())
    assert other.scale_factor == 2.0**15
