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
    second; from the makers' data sheets. memory: GB. small_tiles: the share of `half` that
    attention and a Mamba-2's scan reach, heads of 64, 1,024 tokens. On an H100 cuDNN's attention
    was measured at 25%: beside its products (at 75%) a multiprocessor has as much other work,
    exponentials and copies, as takes it twice their time. The consumer cards' tensor cores are an
    eighth as fast a multiprocessor and clock (512 against 4,096 FLOPs) and the rest is not: 1 / (1
    / 0.75 + 2.67 / 8) = 60%, by arithmetic."""
    name: str
    memory: int
    half: float
    full: float
    double: float
    bandwidth: float
    small_tiles: float


CARDS = (
    Card('RTX 3060', 12, 25.5e12, 12.7e12, 0.2e12, 360e9, 0.60),
    Card('RTX 4090', 24, 165e12, 82.6e12, 1.29e12, 1008e9, 0.60),
    Card('H100', 80, 989e12, 67e12, 34e12, 3350e9, 0.25),     # small_tiles as measured
)


@dataclass(frozen=True)
class Op:
    """One kernel: bytes it reads and writes, FLOPs of its products, and how: 'half' and 'full' are
    the numbers of a library's, 'small tiles' those of attention and scans; doubles: fp64 numbers it
    makes."""
    phase: str              # 'forward', 'backward', 'update'
    name: str
    bytes: float
    flops: float = 0.0
    numbers: str = 'half'
    doubles: float = 0.0


def seconds_of(op, card):
    """Of an operation on a card, alone."""
    speed = {'half': OF_PRODUCTS * card.half, 'full': OF_ARITHMETIC * card.full,
             'small tiles': card.small_tiles * card.half}[op.numbers]
    products = op.flops / speed
    doubles = op.doubles / (OF_ARITHMETIC * card.double)
    return max(op.bytes / (OF_BANDWIDTH * card.bandwidth), products, doubles, KERNEL)
