"""The union of all exposure sections: a recipe's `[exposure]` names one `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atesd.exposure.beta_config import BetaConfig
from atesd.exposure.closed_form import ClosedForm
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.influence import Influence
from atesd.exposure.overlap import Overlap
from atesd.exposure.paired import Paired
from atesd.exposure.schedules import Cosine, Fixed, Linear, Steps, Uniform

ExposureConfig = Annotated[
    Fixed | Linear | Cosine | Steps | Uniform | BetaConfig | ClosedForm | Paired | Difficulty | Influence | Overlap,
    Field(discriminator="kind"),
]
