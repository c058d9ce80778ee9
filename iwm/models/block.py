"""Transformer block: timm's, with a fused backward pass on a GPU and an MLP on selected tokens only."""

from __future__ import annotations

from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from iwm.kernels.bf16_weights import product
from iwm.kernels.gelu import Gelu
from iwm.kernels.mlp import Mlp
from iwm.kernels.residual_norm import residual_norm
from iwm.models.attention import Attention
from iwm.packing import Packing, gather_unique

OWN_LAYERS: dict[str, type[nn.Module]] = {"attn_layer": Attention, "mlp_layer": Mlp, "act_layer": Gelu}
"""Layers of this project used in its blocks, by timm's argument."""


class Block(TimmBlock):
    """timm's Block with the same parameters, for dense rows and packed tokens (`Attention`).

    In a compiled training step on a GPU in bf16, the gradients of its norms, of the residual stream and of the biases
    of its output layers come from one kernel per branch (iwm/kernels/residual_norm.py).
    """

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        attn_mask: Packing | Tensor | None = None,
        is_causal: bool = False,
        selected: Int64[Tensor, " s"] | None = None,
    ) -> Float[Tensor, "b2 t2 d"]:
        """Return the block's output for all tokens [b, t, d], or for the selected ones [1, s, d].

        selected: distinct indices of tokens, counted over all rows. Attention sees all tokens; the MLP, which is two
        thirds of the block's work, runs on the selected ones.
        """
        assert not is_causal  # newer timm passes it on; no block of this project sets it
        if self._fuses(x) and not isinstance(attn_mask, Tensor):
            residual, y = residual_norm(x, self.norm1, self.attn.proj.bias)
            x = residual + product(self.attn.proj, self.attn.attend(y, attn_mask))
            x = x if selected is None else gather_unique(x.flatten(0, 1), selected)[None]
            residual, y = residual_norm(x, self.norm2, self.mlp.fc2.bias)
            return residual + product(self.mlp.fc2, self.mlp.hidden(y))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        x = x if selected is None else gather_unique(x.flatten(0, 1), selected)[None]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _fuses(self, x: Tensor) -> bool:
        """Return True where the fused backward pass applies: where the MLP's does, in a block without other layers."""
        return (
            isinstance(self.attn, Attention)
            and isinstance(self.mlp, Mlp)
            and self.mlp.fuses(x)
            and self.mlp.drop2.p == 0
            and all(type(layer) is nn.Linear and layer.bias is not None for layer in (self.attn.proj, self.mlp.fc2))
            and all(isinstance(norm, nn.LayerNorm) for norm in (self.norm1, self.norm2))
            and all(isinstance(part, nn.Identity) for part in (self.ls1, self.ls2, self.drop_path1, self.drop_path2))
        )
