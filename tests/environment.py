"""The environment of the tests: not the user's. Imported before anything that reads it.

What the user's environment says does not reach the tests, but for where programs are, which GPU they may use, and what
is said to the tests themselves. Caches go to a home that is removed.
"""

import atexit
import os
import re
import shutil
import site
import tempfile
from pathlib import Path

import ditlit

KEPT = re.compile(
    "(.*_)?PATH|LD_.*|CUDA_HOME|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX|SYSTEMROOT|COMSPEC|USER|LOGNAME|LANG|LC_.*|TERM|TMPDIR|"
    "TEMP|TMP|PYTHONDONTWRITEBYTECODE|PYTHONPYCACHEPREFIX|PYTEST_.*|COV_.*|CUDA_VISIBLE_DEVICES|"
    "DITLIT_SHARED|DITLIT_GOLDEN.*|DITLIT_KILLS|DITLIT_BROWSER|DITLIT_PICTURES"
)
HOME = tempfile.mkdtemp(prefix="ditlit-home-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
user_packages = site.getuserbase()  # found from HOME
for name in [name for name in os.environ if not KEPT.fullmatch(name)]:
    del os.environ[name]
paths = [str(Path(__file__).parent), str(Path(ditlit.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
os.environ |= {
    "HOME": HOME,
    "PYTHONUSERBASE": user_packages,
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # other processes run this checkout too
    "OMP_NUM_THREADS": "1",  # models are small here, and tests run side by side
    "MPLCONFIGDIR": HOME,  # a list of fonts, which takes seconds to make
}
