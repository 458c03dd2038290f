"""What `where` means, in plain Python: over the metadata of one row."""

import operator
from collections.abc import Mapping

from tests.fuzz.strategies import same

_ORDER = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


def passes(metadata, where):
    return all(_entry(metadata, key, value) for key, value in where.items())


def _entry(metadata, key, value):
    if key == "$and":
        return all(passes(metadata, part) for part in value)
    if key == "$or":
        return any(passes(metadata, part) for part in value)
    if key == "$not":
        return not passes(metadata, value)
    if isinstance(value, Mapping) and any(name.startswith("$") for name in value):
        return all(_operator(metadata, key, name, operand) for name, operand in value.items())
    return _equal(metadata, key, value)


def _operator(metadata, key, name, operand):
    match name:
        case "$eq":
            return _equal(metadata, key, operand)
        case "$ne":
            return not _equal(metadata, key, operand)
        case "$in":
            return any(_equal(metadata, key, value) for value in operand)
        case "$nin":
            return not any(_equal(metadata, key, value) for value in operand)
        case "$exists":
            return (key in metadata) == operand
    return key in metadata and _ordered(metadata[key], operand, _ORDER[name])


def _ordered(stored, operand, holds):
    if isinstance(stored, bool):
        return False
    if isinstance(operand, str) != isinstance(stored, str) or not isinstance(stored, int | float | str):
        return False
    return holds(stored, operand)


def _equal(metadata, key, value):
    return key in metadata and same(_numbers_alike(metadata[key]), _numbers_alike(value))


def _numbers_alike(value):
    """JSON has one kind of numbers: 1 and 1.0 are equal, as in Python; true is no number."""
    if isinstance(value, float):  # NumPy's float64 is one, too
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, Mapping):
        return {key: _numbers_alike(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_alike(item) for item in value]
    return value
