from __future__ import annotations

import pytest
from pydantic import ValidationError

from atesd.rollout.sampler import SamplingConfig


def test_defaults_are_the_released_recipe() -> None:
    """T_s 1.1, top_p .95, top_k 20, 1024 new tokens, one rollout a prompt."""
    config = SamplingConfig()
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.group_size) == (
        1.1,
        0.95,
        20,
        1024,
        1,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("group_size", 0),
        ("batch_tokens", 0),
        ("min_p", 0.1),
    ],
)
def test_settings_out_of_bounds_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        SamplingConfig.model_validate({field: value})
