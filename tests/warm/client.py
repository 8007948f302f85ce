"""Stands for a program that `tests/warm/server.py` runs: its streams, signals and exit code.

    python -I -S client.py SOCKET PROGRAM [ARGUMENT]...

Imports next to nothing: it is started hundreds of times.
"""

import _signal
import _socket
import array
import json
import os
import sys

FORWARDED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


def open_streams() -> list[int]:
    found = []
    for number in range(3):
        try:
            os.fstat(number)
            found.append(number)
        except OSError:
            pass
    return found


def above_streams(made: _socket.socket) -> _socket.socket:
    """A socket whose number is that of no stream, which it has where a stream was closed."""
    if made.fileno() > 2:
        return made
    again = above_streams(_socket.socket(_socket.AF_UNIX))
    made.close()
    return again


def main() -> None:
    streams = open_streams()
    server = above_streams(_socket.socket(_socket.AF_UNIX))
    server.connect(sys.argv[1])
    task = {
        "program": sys.argv[2], "arguments": sys.argv[3:], "directory": os.getcwd(),
        "environment": dict(os.environ), "streams": streams,
    }  # fmt: skip
    descriptors = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", streams))
    said = json.dumps(task).encode() + b"\n"
    sent = server.sendmsg([said], [descriptors] if streams else [])
    server.sendall(said[sent:])
    answers = b""
    while b"\n" not in answers:
        answers += server.recv(4096)
    pid = int(answers.split()[0])
    for number in FORWARDED:
        _signal.signal(number, lambda number, _: os.kill(pid, number))
    while answers.count(b"\n") < 2 and (more := server.recv(4096)):
        answers += more
    code = json.loads(answers.splitlines()[1])["code"]
    if code < 0:
        _signal.signal(-code, _signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
