"""For all tests. They multiply small matrices, where the threads of a BLAS only get in each other's
way: with one thread the suite takes half as long. Set before NumPy is imported, and inherited.

Programs that a shell starts in the background ignore Ctrl-C, and so do their children: the tests
that interrupt one could then wait for ever. Here they listen, however the tests were started.
"""

import os
import signal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
