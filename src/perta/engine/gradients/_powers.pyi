def add_powers(
    left: int,
    right: int,
    rows: int,
    segments: tuple[tuple[int, int], ...],
    height: int,
    width: int,
    first: int,
    second: int,
    weight: float,
    threads: int,
) -> None: ...
