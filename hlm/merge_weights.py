"""`merge_weight` of the teacher's step: one weight, or those to choose from."""

from __future__ import annotations

from hlm.errors import HlmError

AUTO = "auto"
WEIGHTS = (0.25, 0.5, 0.75, 1.0)


def weights_of(setting: float | list[float] | str) -> tuple[float, ...] | None:
    """The weights to choose from, lowest first; None where the setting is the one weight itself.

    Raises:
        HlmError: a weight outside 0 to 1, none above 0, or a word other than "auto".
    """
    if setting == AUTO:
        return WEIGHTS
    weights = setting if isinstance(setting, list) else [setting]
    if not all(isinstance(weight, float) and 0 <= weight <= 1 for weight in weights) or not any(weights):
        raise HlmError(
            f"merge_weight: expected a number above 0 and up to 1, a list with such, or {AUTO}, found {setting!r}; 0 "
            "alone would train for nothing: use the backbone"
        )
    return tuple(sorted({*weights} - {0.0})) if isinstance(setting, list) else None
