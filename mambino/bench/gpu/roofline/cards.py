"""Cards, and how long an operation takes on one: the larger of what its bytes and its products
take.

The shares of the sheet's figures that real kernels reach are assumptions, and stand here
together."""
from dataclasses import dataclass

OF_BANDWIDTH = 0.85     # of the memory's bytes a second
OF_PRODUCTS = 0.75      # of the tensor cores' peak, in 16 bits
OF_ARITHMETIC = 0.80    # of the other units' peak, in fp32 and fp64
KERNEL = 2e-6           # seconds that the smallest kernel takes
LAUNCH_EAGER = 9e-6     # seconds of the host for one operation of PyTorch
LAUNCH_COMPILED = 6e-6  # … for one of Inductor's


@dataclass(frozen=True)
class Card:
    """FLOP/s of products in 16 bits that accumulate in fp32 (dense), of fp32 and of fp64; bytes a
    second; from the makers' data sheets. memory: GB. attention, scan: the share of `half` that
    causal attention with heads of 64 over 1,024 tokens and a Mamba-2's scan reach.

    On an H100 they were measured: cuDNN's attention 25%, our Triton scan 6.5% (November 2026).
    Beside its products, at 75%, a multiprocessor has so much other work, exponentials and copies.
    The consumer cards' tensor cores are an eighth as fast a multiprocessor and clock (512 against
    4,096 FLOPs) and the rest is not: 1 / (1 / 0.75 + (1 / 0.25 - 1 / 0.75) / 8) = 60%, and 31%, by
    arithmetic."""
    name: str
    memory: int
    half: float
    full: float
    double: float
    bandwidth: float
    attention: float
    scan: float


CARDS = (
    Card('RTX 3060', 12, 25.5e12, 12.7e12, 0.2e12, 360e9, 0.60, 0.31),
    Card('RTX 4090', 24, 165e12, 82.6e12, 1.29e12, 1008e9, 0.60, 0.31),
    Card('H100', 80, 989e12, 67e12, 34e12, 3350e9, 0.25, 0.065),
)


@dataclass(frozen=True)
class Op:
    """One kernel: bytes it reads and writes, FLOPs of its products, and how: 'half' and 'full' are
    the numbers of a library's, 'attention' and 'scan' are the card's shares; doubles: fp64 numbers
    it makes."""
    phase: str              # 'forward', 'backward', 'update'
    name: str
    bytes: float
    flops: float = 0.0
    numbers: str = 'half'
    doubles: float = 0.0


def seconds_of(op, card):
    """Of an operation on a card, alone."""
    speed = {'half': OF_PRODUCTS * card.half, 'full': OF_ARITHMETIC * card.full,
             'attention': card.attention * card.half, 'scan': card.scan * card.half}[op.numbers]
    products = op.flops / speed
    doubles = op.doubles / (OF_ARITHMETIC * card.double)
    return max(op.bytes / (OF_BANDWIDTH * card.bandwidth), products, doubles, KERNEL)
