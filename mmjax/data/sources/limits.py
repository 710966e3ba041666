"""What may a file of unknown origin cost? Formats that are read, and limits.

The first bytes decide what a file is, never its name, so that a decoder never
sees a format that is not listed here.
"""

import dataclasses

from mmjax.data.sources.records import BadRecord

IMAGES = ("PNG", "JPEG", "WEBP", "GIF")
SOUNDS = ("WAV", "FLAC", "OGG", "MP3")
VIDEOS = ("MP4", "MATROSKA", "AVI")

# (format, where in the file, the bytes that stand there)
_SIGNS = (
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("WEBP", 8, b"WEBP"),
    ("GIF", 0, b"GIF8"),
    ("WAV", 8, b"WAVE"),
    ("FLAC", 0, b"fLaC"),
    ("OGG", 0, b"OggS"),
    ("MP3", 0, b"ID3"),
    ("MP4", 4, b"ftyp"),
    ("MATROSKA", 0, b"\x1a\x45\xdf\xa3"),
    ("AVI", 8, b"AVI "),
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """The most that one file may hold; what holds more is a bad record.

  Attributes:
    size: bytes of the file.
    pixels: of a picture, or of a frame of a video.
    seconds: of a sound or a video.
    rate: samples a second of a sound.
    channels: of a sound.
    frames: of a video.
  """

  size: int = 256 * 2**20
  pixels: int = 64_000_000
  seconds: float = 1800.0
  rate: int = 192_000
  channels: int = 16
  frames: int = 200_000

  def check(self, **found: float) -> None:
    """Refuses what is beyond a limit, by the limit's name.

    Raises:
      BadRecord: naming the number and the limit.
    """
    for name, value in found.items():
      limit = getattr(self, name)
      if value > limit:
        raise BadRecord(f"{name}: {value:,} is more than the {limit:,} allowed")


DEFAULT = Limits()


def kind(data: bytes) -> str | None:
  """The format of a file by its first bytes, or None if it is none of ours."""
  for name, start, sign in _SIGNS:
    if data[start : start + len(sign)] == sign:
      return name
  # A frame of MPEG audio, layer III, without a tag before it.
  if len(data) > 2 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2:
    return "MP3"
  return None


def allowed(data: bytes, formats: tuple[str, ...], limits: Limits) -> str:
  """The format of a file.

  Raises:
    BadRecord: if it is empty, too large, or not one of `formats`.
  """
  if not isinstance(data, (bytes, bytearray, memoryview)):
    raise BadRecord(
        f"expected the bytes of a file, found {type(data).__name__}"
    )
  if not len(data):
    raise BadRecord("the file is empty")
  limits.check(size=len(data))
  found = kind(data)
  if found not in formats:
    start = f"a file that begins with {bytes(data[:8])!r}"
    raise BadRecord(
        f"format not allowed: {found or start}; expected {', '.join(formats)}"
    )
  return found
