"""Image World Model: context encoder, target encoder, predictor and loss (paper, section 3)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from iwm.actions import ActionSpec, action_from_params, action_spec
from iwm.compat import set_activation_memory_budget
from iwm.config import Config
from iwm.encoder_outputs import EncoderName
from iwm.masking import PackedMasks
from iwm.model_config import LossConfig
from iwm.models.attention import attention_kernel, to_device
from iwm.models.encoder import Encoder
from iwm.models.layers import compile_blocks
from iwm.models.predictor import Predictor
from iwm.packing import pack_tokens


def normalize_targets(features: Float[Tensor, "r t d"], loss: LossConfig) -> Float[Tensor, "r t d"]:
    """Apply layer norm without affine parameters where loss.normalize_targets is set; else return the features."""
    return F.layer_norm(features, features.shape[-1:]) if loss.normalize_targets else features


class WorldModel(nn.Module):
    """Trained modules (`encoder`, `predictor`) and the EMA teacher (`target_encoder`, without gradients)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.action_spec: ActionSpec = action_spec(config.action, config.views)
        grad_checkpointing = config.train.activation_checkpointing
        self.encoder = Encoder(config.encoder, config.views.size, grad_checkpointing=grad_checkpointing)
        self.encoder.residual = config.train.residual_dtype
        self.predictor = Predictor(config, self.action_spec.size)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: PackedMasks,
    ) -> Float[Tensor, ""]:
        """Return the training loss of a batch, between the predictions and the target encoder's features."""
        targets = self.target_features(target, masks.loss.target_index)
        context = self.encoder(source, masks.context)
        action = action_from_params(params, self.action_spec)
        if self.config.action.shuffle:
            action = action.roll(-1, dims=0)
        predictions = self.predictor.predict_masked(context, masks, action)
        return self.loss(predictions, targets, masks.loss.weight[None])

    def loss(
        self,
        predictions: Float[Tensor, "*b t d"],
        targets: Float[Tensor, "*b t d"],
        weights: Float[Tensor, "*b t"],
    ) -> Float[Tensor, ""]:
        """Return the loss: the distances between predictions and targets, weighted (loss_tokens.loss_weights)."""
        compare = F.mse_loss if self.config.loss.type == "l2" else F.smooth_l1_loss
        per_token = compare(predictions.float(), targets.float(), reduction="none").mean(dim=-1)
        return (per_token * weights).sum()

    @torch.no_grad()
    def target_features(
        self, images: UInt8[Tensor, "b h w 3"], selected: Int64[Tensor, " s"] | None = None
    ) -> Float[Tensor, "r t d"]:
        """Return the targets: the target encoder's features, normalised where loss.normalize_targets is set.

        selected: indices of patches, counted over all images; their features are [1, s, d]. None: all, [b, n, d].
        """
        return self.normalize_features(self.target_encoder(images, selected=selected))

    def normalize_features(self, features: Float[Tensor, "r t d"]) -> Float[Tensor, "r t d"]:
        """Normalise an encoder's features as the loss does its targets."""
        return normalize_targets(features, self.config.loss)

    def encode(self, images: UInt8[Tensor, "b h w 3"], which: EncoderName) -> Float[Tensor, "b n d"]:
        """Return features of whole images, from the target encoder (teacher) or the context encoder (student)."""
        return self.target_encoder(images) if which == "teacher" else self.encoder(images)

    def predict(self, context: Float[Tensor, "b n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        """Predict features of the whole transformed image from whole-image features and an action (iwm/actions.py)."""
        return self.predictor.predict_image(context, action)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder towards the context encoder: target ← momentum·target + (1 − momentum)·context."""
        torch._foreach_lerp_(
            list(self.target_encoder.parameters()), list(self.encoder.parameters()), weight=1.0 - momentum
        )

    def setup(self, device: torch.device, compiled: bool) -> WorldModel:
        """Move to a device in channels-last and select the configured attention.

        compiled: compile block by block, and also the embedding, the sequence building and the loss.
        """
        to_device(self, device, self.config.train.attention_impl)
        if compiled:
            mode = self.config.train.compile_mode
            set_activation_memory_budget(self.config.train.activation_memory_budget)
            for encoder in (self.encoder, self.target_encoder):
                compile_blocks(encoder, (*encoder.blocks, encoder.norm), "embed", mode=mode)
            compile_blocks(self.predictor, self.predictor.blocks, "build_sequence", "project", mode=mode)
            compile_blocks(self, (), "normalize_features", "loss", mode=mode)
        return self

    def attention_kernels(self) -> dict[str, str]:
        """Return the attention kernel of each part in training, found by running each part's first attention layer.

        Call it on the device and before parameters are sharded over processes. No random number is drawn.
        """
        config, device = self.config, self.encoder.pos_embed.device
        packing = pack_tokens(torch.ones(2, config.grid_size**2, dtype=torch.bool), None).to(device)
        parts = {
            "context encoder": (self.encoder, packing),
            "target encoder": (self.target_encoder, None),
            "predictor": (self.predictor, packing if config.masking.type == "ijepa" else None),
        }
        kernels = {}
        for name, (part, packed) in parts.items():
            attention = part.blocks[0].attn
            shape = (2, config.grid_size**2) if packed is None else (1, len(packing.token_index))
            tokens = torch.zeros(*shape, attention.qkv.in_features, device=device)
            with (
                torch.set_grad_enabled(name != "target encoder"),
                torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16_autocast),
            ):
                kernels[name] = attention_kernel(attention, tokens, packed)
        return kernels
