"""The order of columns in the prompts' tiles of experts, written down from the instruction's definition."""


def column_in_tiles(k: int) -> int:
    """Return the column of element k.

    Of 128 columns thread t of four holds group t, 4 of each 16: those that mma.m16n8k16 gives it.
    """
    thread, element = k // 32 % 4, k % 32
    step, place = element // 4, [2 * thread, 2 * thread + 1, 2 * thread + 8, 2 * thread + 9][element % 4]
    return k // 128 * 128 + 16 * step + place
