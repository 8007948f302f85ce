"""The screen in browsers: one application, shown in every tab, and typed into from each."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("textual_serve")
import aiohttp

from commands.start import Web
from mlxfun.errors import UsageError
from mlxfun.serving.options import Address
from tests.fake_engine import FakeEngine
from tests.tui.driving import make
from tests.warm.programs import SHELL, command
from tui.app import ShellApp
from tui.web import server, shared

SECRET = "sesame"
WITH = {"Authorization": f"Bearer {SECRET}"}
Visit = Callable[["Visitor"], Awaitable[None]]


class Visitor:
    """A browser of few words. url: of the page; app: behind it."""

    def __init__(self, url: str, app: ShellApp, session: aiohttp.ClientSession) -> None:
        self.url, self.app, self.session = url, app, session

    async def tab(self, width: int = 100, height: int = 30, **more: Any) -> Tab:
        headers = {**WITH, "Origin": self.url} | more
        query = f"?width={width}&height={height}"
        return Tab(await self.session.ws_connect(f"{self.url}/ws{query}", headers=headers))


class Tab:
    """A connection as the page's script has one."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.seen = socket, ""

    async def until(self, word: str) -> None:
        """Read until `word` was drawn; colours in between do not count."""
        async with asyncio.timeout(20):
            while word not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen):
                message = await self.socket.receive()
                assert message.type == aiohttp.WSMsgType.BINARY, message
                self.seen += message.data.decode()

    async def say(self, *message: Any) -> None:
        await self.socket.send_json(list(message))


def visited(visit: Visit) -> int:
    """The exit code after a visit to a screen on a fake engine."""
    engine, app = FakeEngine(), None

    async def body() -> int:
        nonlocal app
        app = make(engine)
        app.animation_level = "none"
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        listening = server._listening(Address(port=0))
        wanted = Web(Address(port=0), SECRET)
        running = asyncio.create_task(server._served(app, wanted, listening, told.set_result))
        address = (await told).removesuffix(f"/?token={SECRET}")
        while not engine.lines:
            await asyncio.sleep(0.01)
        engine.finish()
        async with aiohttp.ClientSession() as session:
            try:
                await visit(Visitor(address, app, session))
            finally:
                app.exit(0)
        code = await asyncio.wait_for(running, 20)
        listening.close()
        return code

    return asyncio.run(body())


def test_every_tab_shows_the_same_screen_and_types_into_it() -> None:
    async def visit(browser: Visitor) -> None:
        first = await browser.tab()
        await first.until("qwen3_moe")
        second = await browser.tab(90, 26)
        await second.until("qwen3_moe")
        assert second.seen.startswith(shared.PREAMBLE)
        third = await browser.tab(90, 26)  # no other size: still all of it is drawn
        await third.until("qwen3_moe")
        await third.socket.close()
        await second.say("stdin", ":collect")
        async with asyncio.timeout(20):
            while browser.app.main.command.input.value != "collect":
                await asyncio.sleep(0.01)
        assert browser.app.size == (90, 26)  # what both have room for
        await second.socket.close()
        first.seen = ""
        await first.say("resize", {"width": 120, "height": 40})
        async with asyncio.timeout(20):
            while browser.app.size != (120, 40):
                await asyncio.sleep(0.01)
        await first.until("history")
        await first.say("ping", "7")
        async with asyncio.timeout(10):
            while (await first.socket.receive()).data != '["pong", "7"]':
                pass

    assert visited(visit) == 0


def test_quitting_in_one_tab_ends_it_for_all() -> None:
    async def visit(browser: Visitor) -> None:
        tabs = [await browser.tab(), await browser.tab()]
        await tabs[0].until("qwen3_moe")
        await tabs[0].say("stdin", "\x11")  # ctrl+q
        for tab in tabs:
            async with asyncio.timeout(20):
                while (await tab.socket.receive()).type == aiohttp.WSMsgType.BINARY:
                    pass
            assert tab.socket.closed

    assert visited(visit) == 0


def test_only_the_page_with_the_token_gets_in() -> None:
    async def visit(browser: Visitor) -> None:
        async def status(path: str, **headers: str) -> int:
            async with browser.session.get(
                f"{browser.url}{path}", headers=headers, allow_redirects=False
            ) as found:
                assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
                return found.status

        assert await status("/") == 401
        assert await status("/static/js/textual.js") == 401
        assert await status("/?token=wrong") == 401
        assert await status("/", **WITH) == 200
        assert await status("/", **WITH, Host="evil.example") == 403
        assert await status("/", **WITH, Origin="http://evil.example") == 403
        assert await status("/nothing", **WITH) == 404
        for wrong in ({"Origin": "http://evil.example"}, {"Authorization": "Bearer x"}):
            with pytest.raises(aiohttp.WSServerHandshakeError, match=r"40[13]"):
                await browser.tab(**wrong)
        # The token moves from the address into a cookie that scripts do not see.
        async with browser.session.get(
            f"{browser.url}/?token={SECRET}", allow_redirects=False
        ) as found:
            assert (found.status, found.headers["location"]) == (303, "/")
            cookie = found.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Strict" in cookie
        assert await status("/", Cookie=cookie.split(";")[0]) == 200
        async with browser.session.get(browser.url, headers=WITH) as found:
            assert f'"ws:{browser.url.removeprefix("http:")}/ws"' in await found.text()

    visited(visit)


@pytest.mark.parametrize(
    "text", ["x", "[]", "{}", "[1]", '["resize", {"width": "x"}]', '["resize", {}]', "null"]
)
def test_what_is_no_message_of_the_page_ends_its_own_connection(text: str) -> None:
    class Opened:
        sent: Any = None

        async def send_json(self, data: Any) -> None:
            self.sent = data

    behind: Any = SimpleNamespace(_shared=shared.SharedScreen(make(FakeEngine())))
    found = asyncio.run(server.WebServer._took(behind, text, Opened(), Opened()))  # type: ignore[arg-type]
    assert found is (text == "[1]")  # an unknown kind is passed over


def test_a_tab_that_takes_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "WAITING_BYTES", 100)

    async def test() -> None:
        closed = asyncio.Event()

        async def stuck(_: bytes) -> None:
            await asyncio.sleep(60)

        async def close() -> None:
            closed.set()

        screen = shared.SharedScreen(make(FakeEngine()))
        screen.tabs.add(shared.Tab(stuck, close, shared.FIRST))
        for _ in range(3):
            screen.write("x" * 60)
        await asyncio.wait_for(closed.wait(), 5)
        assert not screen.tabs

    asyncio.run(test())


def test_an_address_that_is_taken_is_said() -> None:
    taken = server._listening(Address(port=0))
    with pytest.raises(UsageError, match="choose another port"):
        server._listening(Address(port=taken.getsockname()[1]))
    taken.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--web", "0.0.0.0:0"), "give --token"),
        (("--web", "--plain"), "--plain and --web exclude each other"),
        (("--web", "somewhere"), "no address"),
    ],
)
def test_options_that_do_not_go_together_are_said(words: tuple[str, ...], said: str) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [*command(SHELL), "--demo", *words], cwd=root, text=True,
        capture_output=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert said in done.stderr
