"""Teachers: exponential moving averages (EMA) of what an optimizer trains."""

import copy

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dist_contrastive.models.base import Encoder, Features
from dist_contrastive.models.drop_path import KeyedDropPath
from dist_contrastive.models.heads import KeyedDropout


class Teacher(nn.Module):
    """A copy of a student, encoder and projector, that no gradient reaches and that only `follow` moves.

    MoCo's key encoder (He et al. 2020, equation 2), BYOL's target (Grill et al. 2020, equation 1). Its normalization
    layers see the teacher's own passes, and their running statistics are its own, as in the authors' code of both. It drops
    neither paths nor features, whatever the student drops, as in the authors' code of DINO and DINOv2.
    """

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.projector = copy.deepcopy(projector).requires_grad_(False)
        for module in self.modules():
            if isinstance(module, KeyedDropPath | KeyedDropout):
                module.probability = 0.0

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """What the student's projector would give for images [N, 3, S, S], without gradient."""
        output: Tensor = self.projector(self.encoder(images))
        return output

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """What the student's encoder would give for images [N, 3, S, S], nothing masked, without gradient."""
        return self.encoder.features(images)

    def copy(self, encoder: nn.Module, projector: nn.Module) -> None:
        """The teacher is the student, running statistics included, as at the start."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.projector.load_state_dict(projector.state_dict())

    @torch.no_grad()
    def follow(self, encoder: nn.Module, projector: nn.Module, momentum: float, done: Bool[Tensor, ""]) -> None:
        """teacher = momentum · teacher + (1 - momentum) · student, for parameters, if the update was `done`; in float32, in
        place."""
        # One kernel for all (`_foreach_lerp_`) takes no weight from the device, for which the host would have to wait.
        share = torch.zeros(done.shape, device=done.device).masked_fill_(done, 1.0 - momentum)
        mine: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        theirs: list[Tensor] = [*encoder.parameters(), *projector.parameters()]
        for own, other in zip(mine, theirs, strict=True):
            own.lerp_(other, share)
