"""Tests of the mover: a picture that flow and paint change, between the halves of a codec."""

import pytest
import torch
from torch import Tensor, nn

from avatar.vae.light import LightConfig
from avatar.vae.mover import NUM_VALUES, Mover, Texture

CONFIG = LightConfig(wide=8, mid=8, thin=8, latent_scale=1.0, channels=4)
HEIGHT, WIDTH = 64, 96


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mover() -> Mover:
    """A mover whose fields do not depend on the picture, and are zero."""
    torch.manual_seed(0)
    mover = Mover(CONFIG).requires_grad_(False)
    nn.init.zeros_(mover.leave.weight)
    nn.init.zeros_(fields_of(mover))
    return mover


def fields_of(mover: Mover) -> Tensor:
    """Return what is added to the fields (5, 16): of each square of 4 by 4 to a feature, flow and three of paint."""
    assert mover.leave.bias is not None
    return mover.leave.bias.view(5, 16)


@pytest.fixture
def texture(mover: Mover) -> Texture:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    return mover.look(torch.stack([rows, columns, rows * columns])[None])


def test_without_fields_every_frame_is_the_picture(mover: Mover, texture: Texture) -> None:
    frames = mover.show(texture, randn(1, 1, NUM_VALUES, 3))
    assert frames.shape == (1, 3, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(frames, texture.picture[:, :, None].expand_as(frames))


def test_flow_of_one_unit_moves_by_sixteen_pixels(mover: Mover, texture: Texture) -> None:
    fields = fields_of(mover)
    fields[0] = 1
    [right] = mover.show(texture, randn(1, 1, NUM_VALUES, 1)).unbind(2)
    torch.testing.assert_close(right[..., : WIDTH - 16], texture.picture[..., 16:], atol=1e-4, rtol=1e-4)
    fields[0], fields[1] = 0, 1
    [down] = mover.show(texture, randn(1, 1, NUM_VALUES, 1)).unbind(2)
    torch.testing.assert_close(down[..., : HEIGHT - 16, :], texture.picture[..., 16:, :], atol=1e-4, rtol=1e-4)


def test_moves_of_half_a_pixel_keep_edges(mover: Mover) -> None:
    stripes = torch.sin(torch.arange(WIDTH) * (2 * torch.pi / 5)).expand(1, 3, HEIGHT, WIDTH)
    fields_of(mover)[0] = 0.5 / 16
    [moved] = mover.show(mover.look(stripes), randn(1, 1, NUM_VALUES, 1)).unbind(2)
    # With bilinear weights 0.81.
    assert moved.std() / stripes.std() > 0.93


def test_paint_is_added(mover: Mover, texture: Texture) -> None:
    fields_of(mover)[2:] = torch.tensor((0.1, 0.2, 0.3))[:, None]
    [painted] = mover.show(texture, randn(1, 1, NUM_VALUES, 1)).unbind(2)
    expected = texture.picture + torch.tensor((0.1, 0.2, 0.3))[:, None, None]
    torch.testing.assert_close(painted, expected, atol=1e-4, rtol=1e-4)


def test_a_smaller_picture_moves_as_far(mover: Mover, texture: Texture) -> None:
    fields_of(mover)[0] = 1
    small = Texture(nn.functional.avg_pool2d(texture.picture, 2), texture.features)
    [right] = mover.show(small, randn(1, 1, NUM_VALUES, 1)).unbind(2)
    torch.testing.assert_close(right[..., : WIDTH // 2 - 8], small.picture[..., 8:], atol=1e-4, rtol=1e-4)


def test_latents_are_those_of_the_frames_and_of_streams() -> None:
    torch.manual_seed(0)
    mover = Mover(CONFIG).requires_grad_(False)
    texture = mover.look(randn(1, 2, 3, HEIGHT, WIDTH).clamp(-1, 1))
    values = randn(2, 2, NUM_VALUES, 8)
    latents = mover(texture, values)
    assert latents.shape == (2, 4, 2, HEIGHT // 8, WIDTH // 8)
    streamed = torch.cat([mover(texture, each) for each in values.chunk(2, dim=2)], dim=2)
    torch.testing.assert_close(latents, streamed)
    frames = mover.show(texture, values)[:, :, 4:]
    torch.testing.assert_close(latents[:, :, 1:], mover.codec.encode_steps(frames))
    assert not torch.allclose(latents[:, :, 0], latents[:, :, 1])


def test_a_references_detail_is_raised_and_its_areas_stay(mover: Mover) -> None:
    linear = mover.codec.decoder.linear
    for weight in (*mover.codec.decoder.leave.parameters(), linear.weight):
        nn.init.zeros_(weight)
    assert linear.bias is not None
    # Each patch (c p y x) of 8x8 pixels is dark on the left and light on the right.
    patch = linear.bias.view(3, 4, 8, 8)
    patch[..., :4], patch[..., 4:] = -0.5, 0.5
    picture = mover.read(torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)).picture
    row = picture[0, 0, 4, :8]
    torch.testing.assert_close(row[[1, 2]], torch.full((2,), -0.5))
    # Half of the difference to the mean of 3x3 pixels, a third, is added.
    torch.testing.assert_close(row[[3, 4]], torch.tensor((-2 / 3, 2 / 3)))


def test_a_still_reference_is_decoded_and_encoded(mover: Mover, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a codec of the linear maps alone that invert each other, the reference comes back."""
    monkeypatch.setattr("avatar.vae.mover.SHARPENING", 0.0)
    for name, weight in mover.codec.named_parameters():
        if ".leave." in name:
            nn.init.zeros_(weight)
    encode, decode = mover.codec.encoder.linear, mover.codec.decoder.linear
    for layer in (encode, decode):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    # Small, so that the picture is not clamped.
    decode.weight.mul_(0.1)
    encode.weight.copy_(torch.linalg.pinv(decode.weight.flatten(1))[..., None, None])
    reference = 0.1 * randn(3, 1, 4, HEIGHT // 8, WIDTH // 8)
    latents = mover(mover.read(reference), torch.zeros(1, NUM_VALUES, 4))
    # A texture is one picture, the last of the latent's four frames.
    frames = mover.codec.decode(reference[:, :, None].expand(-1, -1, 2, -1, -1), mover.codec.new_state())[:, :, -1:]
    expected = mover.codec.encode_steps(frames.expand(-1, -1, 4, -1, -1))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert mover.texture_numbers(*reference.shape[-2:]) == sum(
        each.numel() for each in vars(mover.read(reference)).values()
    )
