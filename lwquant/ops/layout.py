"""The one packing of codes, in memory and on disk: a little-endian stream of bits for each row.

Code k of a row occupies bits [k·bits, (k+1)·bits) of the row's stream; the stream is cut into
32-bit words, and the last word is filled with zero bits. Three bits, codes 1 2 3 4 ... :

    word 0, highest bit first:  ... 100 011 010 001
                                     4   3   2   1

Eight codes therefore fill exactly `bits` bytes, and 32 codes exactly `bits` words, whatever the
width. This file is the plain-torch meaning; csrc/ does the same faster, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant.scheme import row_words

_CODES_PER_RUN = 8  # the fewest codes that end on a byte, for any width
_WORD_BYTES = 4


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n_codes) uint8, each below 2**bits, as words (rows, row_words) int32.

    >>> pack_reference(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 3)
    tensor([[2257]], dtype=torch.int32)
    >>> bin(2257)
    '0b100011010001'
    """
    rows, n_codes = codes.shape
    n_runs = -(-n_codes // _CODES_PER_RUN)
    runs = F.pad(codes, (0, n_runs * _CODES_PER_RUN - n_codes)).view(rows, n_runs, _CODES_PER_RUN)
    stream = torch.zeros(rows, n_runs, bits + 1, dtype=torch.int32, device=codes.device)
    for k in range(_CODES_PER_RUN):
        byte, shift = divmod(k * bits, 8)
        spread = runs[:, :, k].to(torch.int32) << shift  # a code touches two bytes at most
        stream[:, :, byte] |= spread & 0xFF
        stream[:, :, byte + 1] |= spread >> 8
    data = stream[:, :, :bits].to(torch.uint8).reshape(rows, n_runs * bits)
    words = torch.zeros(rows, row_words(n_codes, bits), dtype=torch.int32, device=codes.device)
    n_bytes = min(words.shape[1] * _WORD_BYTES, data.shape[1])  # what either has more is zero
    words.view(torch.uint8)[:, :n_bytes] = data[:, :n_bytes]
    return words


def unpack_reference(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """The inverse: words (rows, row_words) int32 as codes (rows, n_codes) uint8.

    >>> unpack_reference(torch.tensor([[2257]], dtype=torch.int32), 3, 4)
    tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    rows = packed.shape[0]
    n_runs = -(-n_codes // _CODES_PER_RUN)
    data = packed.contiguous().view(torch.uint8)
    data = F.pad(data, (0, max(0, n_runs * bits - data.shape[1])))[:, : n_runs * bits]
    stream = F.pad(data.reshape(rows, n_runs, bits), (0, 1)).to(torch.int32)
    codes = torch.empty(rows, n_runs, _CODES_PER_RUN, dtype=torch.uint8, device=packed.device)
    for k in range(_CODES_PER_RUN):
        byte, shift = divmod(k * bits, 8)
        window = stream[:, :, byte] | stream[:, :, byte + 1] << 8
        codes[:, :, k] = (window >> shift) & (2**bits - 1)
    return codes.view(rows, n_runs * _CODES_PER_RUN)[:, :n_codes].contiguous()
