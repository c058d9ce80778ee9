"""UPerNet against the same network written out with torch's functions from the same parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm.config import ConfigError
from iwm.models.heads import UPerNet, segmentation_loss, upsample

WIDTH, CLASSES, CHANNELS = 12, 5, 8


def network(dropout: float = 0.0) -> UPerNet:
    """Return a head whose parameters and statistics are all away from their initial values."""
    torch.manual_seed(0)
    net = UPerNet(WIDTH, CLASSES, channels=CHANNELS, auxiliary_channels=6, dropout=dropout)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.normal_(std=0.3)
    return net


def layers(grid: tuple[int, int], batch: int = 3) -> list[Tensor]:
    drawn = torch.randn(4, batch, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(1))
    return list(drawn)


def written_out(net: UPerNet, inputs: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    rows, columns = grid
    maps = [x.reshape(len(x), rows, columns, WIDTH).permute(0, 3, 1, 2) for x in inputs]

    def norm(x: Tensor, name: str) -> Tensor:
        if net.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def conv(x: Tensor, name: str, at: int = 0) -> Tensor:
        weight = state[f"{name}.{at}.weight"]
        return norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), f"{name}.{at + 1}").relu()

    def up(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    def to(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    finest = up(F.gelu(norm(up(maps[0], "fpn.0.0"), "fpn.0.1")), "fpn.0.3")
    levels = [finest, up(maps[1], "fpn.1"), maps[2], F.max_pool2d(maps[3], 2, 2)]
    top = levels[3]
    pooled = [to(conv(F.adaptive_avg_pool2d(top, s), f"ppm.{i}", 1), top) for i, s in enumerate((1, 2, 3, 6))]
    p3 = conv(torch.cat([top, *pooled], 1), "psp_bottleneck")
    p2 = conv(levels[2], "lateral_convs.2")
    p2 = p2 + to(p3, p2)
    p1 = conv(levels[1], "lateral_convs.1")
    p1 = p1 + to(p2, p1)
    p0 = conv(levels[0], "lateral_convs.0")
    p0 = p0 + to(p1, p0)
    smooth = [conv(p, f"fpn_convs.{i}") for i, p in enumerate((p0, p1, p2))]
    fused = conv(torch.cat([smooth[0], *(to(p, smooth[0]) for p in (*smooth[1:], p3))], 1), "fpn_bottleneck")
    logits = F.conv2d(fused, state["conv_seg.1.weight"], state["conv_seg.1.bias"])
    small = conv(maps[2], "aux_head.0")
    return logits, F.conv2d(small, state["aux_head.1.1.weight"], state["aux_head.1.1.bias"])


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 13)])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_network_that_is_written_out(grid: tuple[int, int], training: bool) -> None:
    net = network().train(training)
    expected, small = written_out(net, layers(grid), grid)
    logits, auxiliary = net(layers(grid), grid)
    assert logits.shape == (3, CLASSES, 4 * grid[0], 4 * grid[1])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if training:
        torch.testing.assert_close(auxiliary, small, atol=1e-4, rtol=1e-4)
    else:
        assert auxiliary is None


def test_own_norms_are_one_for_each_layer() -> None:
    net, grid = UPerNet(WIDTH, CLASSES, channels=CHANNELS, layer_norm="own").eval(), (3, 4)
    with torch.no_grad():
        for factor, norm in enumerate(net.layer_norms, start=1):
            norm.weight.fill_(factor)
    normed = [factor * F.layer_norm(x, (WIDTH,), eps=1e-6) for factor, x in enumerate(layers(grid), start=1)]
    plain = UPerNet(WIDTH, CLASSES, channels=CHANNELS, layer_norm="none").eval()
    plain.load_state_dict({name: x for name, x in net.state_dict().items() if not name.startswith("layer_norms.")})
    torch.testing.assert_close(net(layers(grid), grid)[0], plain(normed, grid)[0])


def test_widths_are_the_recipes() -> None:
    net = UPerNet(768, 150)
    assert sum(p.numel() for p in net.fpn_bottleneck.parameters()) == 4 * 512 * 512 * 9 + 2 * 512
    assert net.aux_head[1][1].weight.shape == (150, 256, 1, 1)
    assert net.conv_seg[0].p == 0.1
    assert {p.kernel_size for p in net.modules() if isinstance(p, nn.ConvTranspose2d)} == {(2, 2)}


def test_a_grid_too_small_for_the_pyramid_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="at least 2×2 patches, not 1×4"):
        network()(layers((1, 4)), (1, 4))


def test_the_loss_is_cross_entropy_where_there_is_a_class() -> None:
    logits, small = torch.randn(2, CLASSES, 4, 6), torch.randn(2, CLASSES, 2, 3)
    masks = torch.randint(0, CLASSES, (2, 9, 11), dtype=torch.uint8)
    masks[0, :5] = 255
    kept = masks != 255

    def mean(maps: Tensor) -> Tensor:
        log = F.interpolate(maps, (9, 11), mode="bilinear", align_corners=False).log_softmax(1)
        right = log.gather(1, masks.long().clamp(max=CLASSES - 1)[:, None])[:, 0]
        return -(right * kept).sum() / masks.numel()

    torch.testing.assert_close(segmentation_loss(logits, small, masks), mean(logits) + 0.4 * mean(small))
    torch.testing.assert_close(segmentation_loss(logits, None, masks), mean(logits))
    assert segmentation_loss(logits, small, torch.full_like(masks, 255)) == 0


def test_every_parameter_learns_until_the_image_is_segmented() -> None:
    torch.manual_seed(0)
    net, grid = UPerNet(WIDTH, 2, channels=16, auxiliary_channels=16), (4, 4)
    inputs = layers(grid, 4)
    masks = (upsample(inputs[0].transpose(1, 2).unflatten(2, grid)[:, :1], (32, 32))[:, 0] > 0).to(torch.uint8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(60):
        loss = segmentation_loss(*net(inputs, grid), masks)
        loss.backward()
        if step == 0:
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None, name
                # An offset that is constant over the image is removed by the norm that follows.
                assert parameter.grad.abs().max() > 0 or name.startswith("fpn."), name
        optimizer.step()
        optimizer.zero_grad()
    right = (upsample(net(inputs, grid)[0], (32, 32)).argmax(1) == masks).float().mean()
    assert right > 0.9


def test_statistics_can_be_shared_between_processes() -> None:
    norms = [m for m in nn.SyncBatchNorm.convert_sync_batchnorm(network()).modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 1 + 4 + 1 + 3 + 3 + 1 + 1


def test_bfloat16_logits_and_loss_are_near() -> None:
    net, grid = network(), (4, 6)
    inputs, masks = layers(grid), torch.randint(0, CLASSES, (3, 32, 48), dtype=torch.uint8)
    exact = net(inputs, grid)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(inputs, grid)
        loss = segmentation_loss(*rounded, masks)
    for near, logits in zip(rounded, exact, strict=True):
        assert (near.float() - logits).norm() / logits.norm() < 0.03
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segmentation_loss(*exact, masks), rtol=0.01, atol=0)
