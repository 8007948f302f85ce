"""Who may see and drive the screen in a browser."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxfun.serving.options import Address
from tui.web.guard import Asked, refusal

HERE, SECRET = Address("127.0.0.1", 8000), "sesame"
GOOD = Asked("127.0.0.1:8000", cookie=SECRET)
SOCKET = replace(GOOD, origin="http://127.0.0.1:8000", socket=True)


@pytest.mark.parametrize(
    "asked",
    [
        GOOD,
        SOCKET,
        replace(GOOD, host="localhost:8000"),
        replace(GOOD, host="[::1]:8000"),
        replace(GOOD, origin="http://127.0.0.1:8000"),
        Asked("127.0.0.1:8000", token=SECRET),
        Asked("127.0.0.1:8000", bearer=SECRET),
    ],
)
def test_the_page_and_its_connection_are_let_in(asked: Asked) -> None:
    assert refusal(asked, HERE, SECRET) is None


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (replace(GOOD, host="evil.example:8000"), 403),
        (replace(GOOD, host="127.0.0.1:8001"), 403),
        (replace(GOOD, host="127.0.0.1.evil.example:8000"), 403),
        (replace(GOOD, host=""), 403),
        (replace(GOOD, host="127.0.0.1"), 403),
        (replace(GOOD, origin="http://evil.example"), 403),
        (replace(GOOD, origin="null"), 403),
        (replace(SOCKET, origin="http://localhost:8000"), 403),
        (replace(SOCKET, origin="http://127.0.0.1:9999"), 403),
        (replace(SOCKET, origin=""), 403),
        (replace(SOCKET, cookie=""), 401),
        (replace(GOOD, cookie=""), 401),
        (replace(GOOD, cookie="sesam"), 401),
        (replace(GOOD, cookie="", token="\ud800"), 401),
    ],
)
def test_others_are_kept_out(asked: Asked, status: int) -> None:
    found = refusal(asked, HERE, SECRET)
    assert found is not None
    assert found.status == status
    assert "\n" not in found.message
    assert SECRET not in found.message


def test_an_address_that_others_reach_is_guarded_by_token_and_origin() -> None:
    public = Address("0.0.0.0", 8000)
    host = "box.local:8000"
    assert refusal(Asked(host, cookie=SECRET), public, SECRET) is None
    there = Asked(host, f"https://{host}", cookie=SECRET, socket=True)
    assert refusal(there, public, SECRET) is None
    assert refusal(replace(there, origin="http://evil.example"), public, SECRET).status == 403
    assert refusal(replace(there, cookie=""), public, SECRET).status == 401
