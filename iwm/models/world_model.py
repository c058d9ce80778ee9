"""The Image World Model: context encoder, target encoder, predictor, and the loss between them (paper, section 3)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from iwm.actions import ActionSpec, action_from_params, action_spec
from iwm.config import Config
from iwm.masking import Masks, PackedMasks
from iwm.models.attention import attention_kernel, settle
from iwm.models.encoder import Encoder
from iwm.models.layers import compile_parts
from iwm.models.predictor import Predictor
from iwm.packing import pack


class WorldModel(nn.Module):
    """What is trained (`encoder`, `predictor`) and its slow teacher (`target_encoder`, never given a gradient)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.action_spec: ActionSpec = action_spec(config.action, config.views)
        checkpointing = config.train.activation_checkpointing
        self.encoder = Encoder(config.encoder, config.views.size, checkpointing=checkpointing)
        self.encoder.residual = config.train.residual
        self.predictor = Predictor(config, self.action_spec.size)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: PackedMasks,
    ) -> Float[Tensor, ""]:
        """Training loss of a batch: how far predictions are from the target encoder's features."""
        targets = self.targets(target)
        context = self.encoder(source, masks.context)
        predictions = self.predictor.inpaint(context, masks, action_from_params(params, self.action_spec))
        return self.distance(predictions, targets, self.counted(masks))

    def counted(self, masks: Masks | PackedMasks) -> Bool[Tensor, "b m n"]:
        """The tokens that the loss is taken over."""
        return masks.queried | masks.visible[:, None] if self.config.loss.predict == "all" else masks.queried

    def distance(
        self,
        predictions: Float[Tensor, "b m n d"],
        targets: Float[Tensor, "b n d"],
        counted: Bool[Tensor, "b m n"],
    ) -> Float[Tensor, ""]:
        """The loss between predictions and targets over the counted tokens; every prediction weighs the same."""
        compare = F.mse_loss if self.config.loss.kind == "l2" else F.smooth_l1_loss
        targets = targets[:, None].expand_as(predictions)
        per_token = compare(predictions.float(), targets.float(), reduction="none").mean(dim=-1)
        per_row = (per_token * counted).sum(dim=-1)
        if self.config.loss.reduction == "mean":
            per_row = per_row / counted.sum(dim=-1).clamp(min=1)
        return per_row.mean()

    @torch.no_grad()
    def targets(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """What predictions are compared with: the target encoder's features, normed as the loss has it."""
        features = self.target_encoder(images)
        return self.standardise(features) if self.config.loss.target_norm else features

    def standardise(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Layer norm without affine parameters."""
        return F.layer_norm(features, features.shape[-1:])

    def encode(self, images: UInt8[Tensor, "b h w 3"], which: Literal["teacher", "student"]) -> Float[Tensor, "b n d"]:
        """Features of whole images, from the target encoder (teacher) or the context encoder (student)."""
        return self.target_encoder(images) if which == "teacher" else self.encoder(images)

    def predict(self, context: Float[Tensor, "b n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        """Features of the whole transformed image, from whole-image features and an action (actions.py layout)."""
        return self.predictor.transform(context, action)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder towards the context encoder: target ← momentum·target + (1 − momentum)·context."""
        torch._foreach_lerp_(
            list(self.target_encoder.parameters()), list(self.encoder.parameters()), weight=1.0 - momentum
        )

    def prepare(self, device: torch.device, compiled: bool) -> WorldModel:
        """Move to a device in channels-last, choose the configured attention, compile block by block if asked."""
        settle(self, device, self.config.train.attention)
        if compiled:
            for encoder in (self.encoder, self.target_encoder):
                compile_parts(encoder, (*encoder.blocks, encoder.norm), "embed")
            compile_parts(self.predictor, self.predictor.blocks, "place", "finish")
            compile_parts(self, (), "standardise", "distance")
        return self

    def attention_kernels(self) -> dict[str, str]:
        """Attention kernel of each part in training (iwm.models.attention.attention_kernel), by a call of each.

        Call it on the device and before parameters are divided over processes. No random number is drawn.
        """
        config, device = self.config, self.encoder.pos_embed.device
        packing = pack(torch.ones(2, config.grid**2, dtype=torch.bool), None).to(device)
        parts = {
            "context encoder": (self.encoder, packing),
            "target encoder": (self.target_encoder, None),
            "predictor": (self.predictor, packing if config.masking.kind == "ijepa" else None),
        }
        kernels = {}
        for name, (part, packed) in parts.items():
            attention = part.blocks[0].attn
            shape = (2, config.grid**2) if packed is None else (1, len(packing.place))
            tokens = torch.zeros(*shape, attention.qkv.in_features, device=device)
            with (
                torch.set_grad_enabled(name != "target encoder"),
                torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"),
            ):
                kernels[name] = attention_kernel(attention, tokens, packed)
        return kernels
