"""Seeds of corruptions: made of a picture and its prompt, so that neither batch, padding nor rank matters."""

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Prompt = int | str | bytes | Tensor | Sequence[int]


def seed_of(*parts: bytes) -> int:
    """Return a seed in [0, 2**63) of some bytes, and of where one part ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little") >> 1


def bytes_of(prompt: Prompt) -> bytes:
    """Return the bytes that tell a prompt from others: of its text, of its token ids, or of a number."""
    if isinstance(prompt, bytes):
        return prompt
    if isinstance(prompt, str):
        return b"t" + prompt.encode()
    if isinstance(prompt, int | np.integer):
        return b"n" + int(prompt).to_bytes(16, "little", signed=True)
    ids = prompt.cpu().numpy() if isinstance(prompt, Tensor) else np.asarray(prompt)
    return b"i" + ids.astype("int64").tobytes()


def picture_bytes(pixels: Tensor) -> bytes:
    """Return the bytes that tell a picture `[..., C, H, W]` of 8-bit pixels from others."""
    return repr(tuple(pixels.shape[-3:])).encode() + pixels.contiguous().cpu().numpy().tobytes()
