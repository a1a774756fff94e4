"""The table of models, one file each.  What a further model needs: full_scale/README.md, Another model."""

from full_scale.models import flux, klein, sd3
from full_scale.models.family import Family

FAMILIES: dict[str, Family] = {"flux": flux.FAMILY, "sd3": sd3.FAMILY, "klein": klein.FAMILY}  # by the name of the task
