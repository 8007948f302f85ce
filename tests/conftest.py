"""For all tests. They multiply small matrices, where the threads of a BLAS only get in each other's
way: with one thread the suite takes half as long. Set before NumPy is imported, and inherited.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
