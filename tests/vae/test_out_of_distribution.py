"""Tests of avatar.vae.out_of_distribution, with hand-made descriptors and with the embedded checkpoint."""

from dataclasses import asdict, replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.part import Part
from avatar.vae.out_of_distribution import OutOfDistributionCheck
from avatar.vae.picture.reading import Picture
from avatar.vae.picture.rule import PictureRule
from avatar.vae.vae import Vae, VaeConfig, load, parse_config
from services.local.processes import ROOT
from tests.conftest import ASSETS
from tests.vae.conftest import LIGHT, SIZE, light_codec
from tests.vae.face.scenes import scene
from tests.vae.picture.files import file
from training.out_of_distribution import descriptor, fit_check

KIND = OutOfDistributionCheck((1.0, 2.0), (1.0, 0.0, 0.5), 1.5, "unlike")
RGB = torch.zeros(SIZE[1], SIZE[0], 3, dtype=torch.uint8)


def seen(notice: str = "") -> Picture:
    return Picture(RGB, SIZE, 1, 0.3, notice)


def test_distance_uses_the_covariance() -> None:
    assert KIND.distance(torch.tensor([1.0, 2.0])) == 0
    assert KIND.distance(torch.tensor([3.0, 2.0])) == pytest.approx(2 / 2**0.5)
    along = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    pairs = torch.cat([along, along], 1) + 0.01 * torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    kind = fit_check([*pairs])
    assert kind.distance(torch.tensor([1.0, -1.0])) > 10 > kind.limit > kind.distance(torch.tensor([1.0, 1.0]))


def test_a_root_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"familiar\.root must have 3 numbers for the 2 of mean, got 2"):
        replace(KIND, root=(1.0, 2.0))


def test_pictures_beyond_the_limit_get_a_notice() -> None:
    codec = light_codec()
    plain = Vae(codec, VaeConfig("light", PictureRule("cover", width=SIZE[0], height=SIZE[1]), 25, asdict(LIGHT)))
    motion = plain.encode_picture(RGB)
    assert plain.notice(seen(), motion) == ""
    assert plain.notice(seen("No face."), motion) == "No face."
    own = descriptor(plain, RGB)
    kind = OutOfDistributionCheck((*own.tolist(),), (0.0,) * (len(own) * (len(own) + 1) // 2), 0.0, "unlike")
    assert Vae(codec, replace(plain.config, familiar=kind)).notice(seen(), motion) == ""
    away = replace(kind, root=(1.0, *kind.root[1:]), mean=(kind.mean[0] + 1, *kind.mean[1:]))
    assert Vae(codec, replace(plain.config, familiar=away)).notice(seen("No face."), motion) == "No face. unlike"


def test_the_check_is_saved_in_the_config() -> None:
    part = open_part(ROOT / "models/tiny", "vae")
    kind = replace(KIND, mean=(1.0,) * 64, root=(0.5,) * 2080)
    config = parse_config({**part.config, "familiar": asdict(kind)})
    assert config.familiar == kind
    assert load(Part(part.folder, asdict(config), part.files)).config.familiar == kind


def test_the_shipped_portraits_pass_and_other_pictures_do_not() -> None:
    """It fails if the codec changed and `python -m training.out_of_distribution` was not run again."""
    vae = load(open_part(ROOT / "models/tiny", "vae"))

    def notice(data: bytes) -> str:
        shown = vae.read_picture(data)
        return vae.notice(shown, vae.encode_picture(shown.rgb))

    for path in (ASSETS / "portrait.png", *(ASSETS / "portraits").glob("*.png")):
        assert notice(path.read_bytes()) == "", path
    assert notice(file(scene((1600, 900), (1350, 470, 168)))) == ""  # the face is found, and cropped as in training
    assert "drawn people" in notice(png(np.random.default_rng(0).integers(0, 256, (256, 256, 3))))
    assert "drawn people" in notice(png(np.full((256, 256, 3), 90)))


def png(rgb: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> bytes:
    file = BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
