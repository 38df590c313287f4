"""What users can set, each setting declared once: dataclasses of plain values, checked when they are made.

Nothing here imports torch, so that help comes, and mistakes are told, before it is loaded.
"""

from ditlit.settings.groups import Classes, Drawing, Execution, Judging, Reading
from ditlit.settings.sampling import SAMPLERS, Sampling

__all__ = ["SAMPLERS", "Classes", "Drawing", "Execution", "Judging", "Reading", "Sampling"]
