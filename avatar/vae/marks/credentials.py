"""Content Credentials (C2PA) of films: a signed manifest which says that a model made the film, and who vouches for it.

Needs the package c2pa-python, which signs without a network; the signature has no time stamp of an authority.
Source: C2PA Technical Specification 2.2: 13.2 (algorithms), 14.5 (certificates), 18.15 (actions).
"""

import io
from pathlib import Path
from typing import Any

import c2pa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from PIL import Image

from avatar.vae.marks.metadata import SOURCE_TYPE

ACTION = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}
MANIFEST = {
    "claim_generator_info": [{"name": "avatar"}],
    "assertions": [{"label": "c2pa.actions", "data": {"actions": [ACTION]}}],
}
# Media types by FFmpeg's names of the kinds of film.
FORMATS = {"mp4": "video/mp4", "mov": "video/quicktime"}
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class FilmSigner:
    """Signs films with a certificate and its key.

    certificate: PEM file of the certificate, followed by those that lead to its authority. key: PEM file of its private
    key. ValueError if they cannot sign, which a picture is signed to find out.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        try:
            info = c2pa.C2paSignerInfo(_algorithm(key), certificate.read_bytes(), key.read_bytes(), None)
            self._signer = c2pa.Signer.from_info(info)
            picture = io.BytesIO()
            Image.new("RGB", (16, 16)).save(picture, "JPEG")
            self._sign("image/jpeg", picture, io.BytesIO())
        except (c2pa.C2paError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"the certificate {certificate} and the key {key} cannot sign: {error}") from error

    def sign(self, film: Path, kind: str) -> None:
        """Put a signed manifest into a film, in place. kind: a key of FORMATS. OSError if it cannot be written."""
        signed = film.with_name(f"{film.name}.signed")
        try:
            with film.open("rb") as source, signed.open("w+b") as target:
                self._sign(FORMATS[kind], source, target)
            signed.replace(film)
        except c2pa.C2paError as error:
            raise OSError(f"cannot sign {film}: {error}") from error
        finally:
            signed.unlink(missing_ok=True)

    def _sign(self, media_type: str, source: Any, target: Any) -> None:
        with c2pa.Builder(MANIFEST) as builder:
            builder.sign(self._signer, media_type, source, target)


def _algorithm(key: Path) -> str:
    """Return C2PA's name of the algorithm that a key signs with. ValueError if there is none."""
    match load_pem_private_key(key.read_bytes(), password=None):
        case EllipticCurvePrivateKey(curve=curve) if curve.name in CURVES:
            return CURVES[curve.name]
        case RSAPrivateKey():
            return "ps256"
        case Ed25519PrivateKey():
            return "ed25519"
    raise ValueError("expected a key of P-256, P-384, P-521, RSA or Ed25519")
