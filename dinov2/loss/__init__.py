"""The three losses of DINOv2: class token (DINO), masked patches (iBOT) and spread (KoLeo)."""

from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.gram_loss import GramLoss
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.loss.koleo_loss import KoLeoLoss

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "iBOTPatchLoss"]
