"""I-JEPA's published predictor computes here what its tensors mean, and is optional."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iwm.models.external.loading import ExternalCheckpointError, NoPredictorError, load_external
from iwm.models.layers import sincos_positions
from iwm.models.predictor import Predictor
from iwm.models.predictor_backbone import PredictorBackbone, copy_pretrained
from iwm.models.predictor_shape import shape_of_predictor
from tests.models.published import blocks, ijepa, ijepa_predictor_state, pictures, published, under, vit_state

OWN, DEPTH, HEADS = 24, 2, 3


def write(tmp_path: Path, **changes: Tensor) -> Path:
    """Write a file whose predictor has other width, depth and heads than its encoder."""
    predictor = {**ijepa_predictor_state(own=OWN, depth=DEPTH), **changes}
    content: dict[str, Any] = ijepa(vit_state(class_token=False))
    torch.save({**content, "predictor": under("module.", predictor)}, tmp_path / "ijepa.pth.tar")
    return tmp_path / "ijepa.pth.tar"


def plain_prediction(context: Tensor, grid: int) -> Tensor:
    """Compute the prediction of all positions from all positions, from the published tensors alone."""
    p, positions = ijepa_predictor_state(own=OWN, depth=DEPTH), sincos_positions(OWN, grid)
    seen = F.linear(context, p["predictor_embed.weight"], p["predictor_embed.bias"]) + positions
    asked = (p["mask_token"] + positions).expand(len(context), -1, -1)
    x = blocks(torch.cat((seen, asked), dim=1), p, "predictor_blocks", heads=HEADS)[:, grid**2 :]
    x = F.layer_norm(x, (OWN,), p["predictor_norm.weight"], p["predictor_norm.bias"], eps=1e-6)
    return F.linear(x, p["predictor_proj.weight"], p["predictor_proj.bias"])


@pytest.mark.parametrize("size", [32, 48])
def test_it_predicts_as_its_tensors_applied_plainly(size: int, tmp_path: Path) -> None:
    """At another size its positions are those of the other grid."""
    encoder = load_external("ijepa", write(tmp_path), heads=4, predictor=True, predictor_heads=HEADS, image_size=size)
    assert isinstance(encoder.predictor, Predictor)
    assert not encoder.predictor.conditioned
    context = encoder.tokens(pictures(size))
    predicted = PredictorBackbone(copy_pretrained(encoder.predictor))(context)
    torch.testing.assert_close(predicted, plain_prediction(context, size // 8), atol=1e-4, rtol=1e-4)


def test_its_shape_is_that_of_the_file_and_its_heads_those_of_the_encoder(tmp_path: Path) -> None:
    kind, path, _ = published("ijepa", tmp_path)
    predictor = load_external(kind, path, heads=4, predictor=True).predictor
    assert isinstance(predictor, Predictor)
    shape = shape_of_predictor(predictor)
    assert (shape.embed_dim, shape.depth, shape.num_heads, shape.mlp_ratio) == (32, 1, 4, 4.0)


@pytest.mark.parametrize("entry", [None, {}])
def test_a_file_without_it_is_an_encoder_alone(entry: dict[str, Tensor] | None, tmp_path: Path) -> None:
    content = ijepa(vit_state(class_token=False))
    del content["predictor"]
    torch.save(content if entry is None else {**content, "predictor": entry}, tmp_path / "encoders.pth")
    assert load_external("ijepa", tmp_path / "encoders.pth", heads=4)(pictures()).shape == (2, 16, 32)
    with pytest.raises(NoPredictorError, match="holds I-JEPA's encoders alone"):
        load_external("ijepa", tmp_path / "encoders.pth", heads=4, predictor=True)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def refusal(heads: int = HEADS, **changes: Tensor) -> str:
        with pytest.raises(ExternalCheckpointError) as refused:
            load_external("ijepa", write(tmp_path, **changes), heads=4, predictor=True, predictor_heads=heads)
        return str(refused.value)

    assert "its predictor's embed-dim 24 is not a multiple of its predictor's num-heads 5" in refusal(heads=5)
    assert "give --external.predictor-heads" in refusal(heads=5)
    assert "predictor_pos_embed is not the sine-cosine" in refusal(predictor_pos_embed=torch.zeros(1, 16, OWN))
    assert "action_mixer.weight is unexpected" in refusal(**{"action_mixer.weight": torch.zeros(1)})
    assert "predictor_proj.bias is [5], not [32]" in refusal(**{"predictor_proj.bias": torch.zeros(5)})
