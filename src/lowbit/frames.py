"""Rows as a pandas data frame, where pandas is installed."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import RunError


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A ``pandas.DataFrame`` with a line for each row and a column for each name.

    Raises:
        RunError: pandas is missing.
    """
    try:
        from pandas import DataFrame  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise RunError(f"to_dataframe needs {error.name}: pip install pandas") from error
    return DataFrame(list(rows), columns=list(dict.fromkeys(name for row in rows for name in row)))
