"""Arms that are trained at once, and the frozen encoders they share.

The frozen encoders run once for all arms of a batch: linear probes of several learning rates, a pretrained and a random
predictor, several seeds. No arm touches another, and what an arm draws is its own, so each is trained as if it were
alone; a test holds them to that, bit for bit. As arms share no graph, each has its forward and backward pass before the
next begins: a step needs the memory of the largest arm, however many there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from iwm.config import AttentionKind
from iwm.models.attention import settle
from iwm.models.backbone import Backbone
from iwm.models.reader import Reader

PIXELS = "pixels"

Shared = Mapping[str, Tensor]
"""What arms are given: PIXELS, [b, h, w, 3], uint8 or grey levels from 0 to 255, for arms that train an encoder; and
the tokens of each frozen encoder by its name, [b, s, d] after the last norm, prefix tokens (class token) first, or the
mean of its patches, [b, 1, d]."""


def torch_seed(*parts: int) -> int:
    """Return a seed of torch's generators, 0 to 2⁶³ − 1, that all of these numbers decide."""
    # Shifted as a Python integer: numpy 1 shifts no uint64 by one of those.
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


class Arm(nn.Module):
    """One thing that is trained."""

    @abstractmethod
    def losses(self, shared: Shared, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Its loss; images of several tasks lie one task after the other, with each task's targets."""

    def forward(self, shared: Shared, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Return `losses`: what training calls, DDP around it or not."""
        return self.losses(shared, targets)

    @abstractmethod
    def logits(self, shared: Shared, task: int) -> Float[Tensor, "..."]:
        """What it says of images of one task: [b, classes], or [b, classes, h, w]."""


class FrozenEncoders(nn.Module):
    """Encoders that are used and not trained; there may be none."""

    def __init__(self, encoders: Mapping[str, Backbone], *, pooled: bool = False) -> None:
        """pooled: patches are averaged here, once for all arms; there are no prefix tokens then."""
        super().__init__()
        self.names, self._pooled = tuple(encoders), pooled
        self.encoders = nn.ModuleList(encoders.values()).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Real[Tensor, "b h w 3"]) -> Shared:
        encoders = (cast(Backbone, encoder) for encoder in self.encoders)
        features = {name: self._features(encoder, pixels) for name, encoder in zip(self.names, encoders, strict=True)}
        return {PIXELS: pixels, **features}

    def _features(self, encoder: Backbone, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        return encoder.patches(pixels).mean(1, keepdim=True) if self._pooled else encoder.tokens(pixels)

    def train(self, mode: bool = True) -> FrozenEncoders:
        return super().train(False)


class Study(nn.Module):
    """Arms and what they share."""

    def __init__(self, arms: Mapping[str, Arm], encoders: FrozenEncoders, seeds: Sequence[int]) -> None:
        """seeds: of what each arm draws in training (drop path, actions)."""
        super().__init__()
        self.names = tuple(arms)
        self.seeds = tuple(seeds)
        self.arms = nn.ModuleList(arms.values())
        self.encoders = encoders

    def prepare(self, device: torch.device, *, compiled: bool = False, attention: AttentionKind = "auto") -> Study:
        """Move to a device and choose the attention; of the arms, compile encoders and predictors if asked, which the
        frozen encoders are where they come from (bench.open_bench)."""
        settle(self, device, attention)
        for part in self.arms.modules():
            if isinstance(part, Backbone | Reader):
                part.prepare(device, compiled=compiled, attention=attention)
        return self

    def seed(self, arm: int, number: int, rank: int) -> None:
        """Seed torch's own generators for an arm's forward pass.

        number, rank: of the pass and the process. With the arm's seed they decide all that it draws: arms of one seed
        draw the same, and a training that goes on draws what it would have drawn.
        """
        torch.manual_seed(torch_seed(self.seeds[arm], number, rank))

    @torch.no_grad()
    def predict(self, inputs: Tensor | Shared, task: int, arms: Sequence[int]) -> list[Tensor]:
        """What these arms say of images of one task."""
        shared = self.share(inputs)
        return [self.arm(number).logits(shared, task).float() for number in arms]

    def arm(self, number: int) -> Arm:
        """The arm of this number."""
        return cast(Arm, self.arms[number])

    def share(self, inputs: Tensor | Shared) -> Shared:
        """What the arms are given."""
        return cast(Shared, self.encoders(inputs)) if isinstance(inputs, Tensor) else inputs

    def trained(self) -> dict[str, Tensor]:
        """The arms' parameters and buffers, by arm number: all that training changes."""
        return self.arms.state_dict()
