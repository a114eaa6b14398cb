"""Marks for machines: one XMP packet with the IPTC property DigitalSourceType, in the places that formats have for it.

A JPEG file has it in its APP1 segment, an MP4 file in a `uuid` box, and a key frame of H.264 in an SEI message.

Sources: IPTC Photo Metadata Standard 2023.1 (the property and its values); ISO 16684-3 (XMP in files);
ITU-T H.264, 7.3.2.3 and D.1.7 (SEI messages).
"""

from uuid import UUID

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's name of media that a trained model generated."""

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
).encode()
XMP_UUID = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")
"""The `uuid` of boxes that hold an XMP packet. Source: ISO 16684-3, MPEG-4."""

XMP_BOX = (8 + 16 + len(XMP)).to_bytes(4, "big") + b"uuid" + XMP_UUID.bytes + XMP

# H.264's start code, types of NAL units, and type of SEI messages that begin with a UUID.
START_CODE, IDR_SLICE, SEI, USER_DATA = b"\0\0\1", 5, 6, 5
_USER_DATA_SIZE = len(XMP_UUID.bytes + XMP)
# A size is the sum of its bytes, all but the last one 255; a one bit ends the unit.
_SEI_SIZE = b"\xff" * (_USER_DATA_SIZE // 255) + bytes([_USER_DATA_SIZE % 255])
SEI_UNIT = bytes([SEI, USER_DATA]) + _SEI_SIZE + XMP_UUID.bytes + XMP + b"\x80"

# Marks of each encoding. Raw pixels have no place for metadata.
MARKS_OF: dict[str, tuple[str, ...]] = {"rgb24": (), "jpeg": ("xmp",), "h264": ("sei",), "fmp4": ("xmp", "sei")}


def mark_key_frame(access_unit: bytes) -> bytes:
    """Return a key frame of H.264, in Annex B form, with the SEI message in place of the encoder's own user data.

    The encoder's own text of 600 bytes repeats its options, and is longer than the mark.
    """
    start, *units = access_unit.split(START_CODE)
    kept = [unit for unit in units if unit[:2] != bytes([SEI, USER_DATA])]
    slice_at = next(at for at, unit in enumerate(kept) if unit[0] & 31 == IDR_SLICE)
    return START_CODE.join([start, *kept[:slice_at], SEI_UNIT, *kept[slice_at:]])
