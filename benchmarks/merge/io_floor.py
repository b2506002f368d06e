"""The least that a merge on this machine costs: read some files and write one, in pieces that stay in the cache.

Run as a process of its own: ``python io_floor.py OUTPUT BYTES INPUT...``.
"""

import mmap
import os
import sys

_PIECE = 1 << 19


def main(output: str, size: int, inputs: list[str]) -> None:
    """Read every input whole, a piece of each in turn, and write ``size`` bytes and flush them to the disk."""
    piece = memoryview(mmap.mmap(-1, _PIECE))
    descriptors = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(target, 0, size)
    longest = max([size, *(os.fstat(descriptor).st_size for descriptor in descriptors)])
    for at in range(0, longest, _PIECE):
        for descriptor in descriptors:
            os.preadv(descriptor, [piece], at)
        if at < size:
            os.pwrite(target, piece[: min(_PIECE, size - at)], at)
    os.fsync(target)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
