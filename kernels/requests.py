"""Finds the request of a row by a binary search over where the requests' rows begin: the host prepares nothing."""

import triton
import triton.language as tl


@triton.jit
def request_of_row(row, starts, requests):
    """The request whose rows begin last at or before `row`; padding after all rows gets the last one."""
    return _last_begun(row, starts, requests, 1, 0)


@triton.jit
def request_of_tile(tile, starts, requests, ROWS: tl.constexpr):
    """The request of a tile of at most ROWS rows, and which of the request's tiles it is.

    A request gets a tile for each ROWS rows and a spare one, so that its tiles begin at starts[r] // ROWS + r, whatever
    the requests before it have; some tiles have no rows.
    """
    request = _last_begun(tile, starts, requests, ROWS, 1)
    return request, tile - (tl.load(starts + request) // ROWS + request)


@triton.jit
def _last_begun(at, starts, requests, ROWS: tl.constexpr, SPARE: tl.constexpr):
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle * SPARE <= at:
            low = middle
        else:
            high = middle
    return low
