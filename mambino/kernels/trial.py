"""Calls some functions of a library that was compiled of native.cpp, each once, and ends; native.py
starts it as a process of its own before a new library is used.

    python trial.py native-….so     # status 0: it runs on this processor

Of the standard library alone: it must be there at once. The functions are those that need the most
of a processor: products of numbers in fp32, bf16, 8 and 4 bits, and a vector's exponentials. A
library without one of them (a test's) is none the worse.
"""
import ctypes
import sys

COLUMNS = 128
ROWS = 32
FORMATS = 4             # of a matrix, matrices.h's: fp32, bf16, int8, int4


class Matrix(ctypes.Structure):
    """native.cpp's struct of this name."""
    _fields_ = [(name, ctypes.c_int64) for name in ('format', 'rows', 'columns', 'codes', 'scales')]


def call(library, name, *arguments):
    """A function of the library: ints have 64 bits, buffers are their address."""
    function = getattr(library, name, None)
    if function:
        function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))


def floats(n):
    """A buffer of n numbers of 1, with room behind for a vector that is read beyond them."""
    return (ctypes.c_float * (n + 64))(*[1.0] * n)


def main(path):
    library = ctypes.CDLL(path)
    n = ROWS * COLUMNS
    gate, up, y = floats(n), floats(n), floats(n)
    call(library, 'swiglu_forward', 0, n // 16, 0, gate, up, y)
    if hasattr(library, 'swiglu_forward') and not 0.7 < y[0] < 0.8:
        raise SystemExit(f'it computes silu(1) to be {y[0]}')
    codes, scales = floats(n), floats(n)
    for format in range(FORMATS):
        matrix = Matrix(format, ROWS, COLUMNS, ctypes.addressof(codes), ctypes.addressof(scales))
        for tokens in (1, 16):          # by one row, and by many at once
            x, y = floats(tokens * COLUMNS), floats(tokens * ROWS)
            call(library, 'linear_step', 1, tokens, ctypes.byref(matrix), x, y)
            if format:
                call(library, 'tiles_product', 1, tokens, ctypes.byref(matrix), x, y)
        if format == 0 and hasattr(library, 'linear_step') and y[0] != COLUMNS:
            raise SystemExit(f'it computes a sum of {COLUMNS} to be {y[0]}')


if __name__ == '__main__':
    main(sys.argv[1])
