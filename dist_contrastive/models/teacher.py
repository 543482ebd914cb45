"""Teachers: exponential moving averages (EMA) of what an optimizer trains."""

import copy

import torch
from torch import Tensor, nn

from dist_contrastive.models.drop_path import KeyedDropPath
from dist_contrastive.models.heads import KeyedDropout


class Teacher(nn.Module):
    """A copy of `student` that no gradient reaches and that only `follow` moves.

    MoCo's key encoder (He et al. 2020, equation 2), BYOL's target (Grill et al. 2020, equation 1). Its normalization
    layers see the teacher's own passes, and their running statistics are its own, as in the authors' code of both. It drops
    neither paths nor features, whatever the student drops, as in the authors' code of DINO and DINOv2.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)
        for module in self.module.modules():
            if isinstance(module, KeyedDropPath | KeyedDropout):
                module.probability = 0.0

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """What `student.forward` would give, without gradient."""
        output: Tensor = self.module(*inputs)
        return output

    def copy(self, student: nn.Module) -> None:
        """The teacher is the student, running statistics included, as at the start."""
        self.module.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """teacher = momentum · teacher + (1 - momentum) · student, for parameters; in float32, in place."""
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - momentum)
