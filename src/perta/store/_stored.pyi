def difference(
    out: int, values: int, is_values_bfloat16: bool, base: int, is_base_bfloat16: bool, count: int
) -> None: ...
def subtract(
    stored: int,
    is_bfloat16: bool,
    delta: int,
    count: int,
    first_key: int,
    second_key: int,
    start: int,
) -> tuple[float, float, float, float]: ...
def round(  # noqa: A001
    out: int, values: int, count: int, first_key: int, second_key: int, start: int
) -> None: ...
