"""Memory that a process on a CPU has freed stays with it, for what it allocates next."""

import ctypes
import platform

from stages._runtime import Runtime

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = 2**31 - 1  # bytes above which free memory would go back


def keep_freed_memory(runtime: Runtime) -> None:
    """Tell malloc not to give memory back to the kernel before the process ends.

    By default glibc maps every large tensor afresh, and the first touch of each of its pages is a fault: they took
    two fifths of the time of the root's `generate`. Nothing is done where tensors live on a GPU, or without glibc.
    """
    if runtime.torch_device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_MAX, 0)
