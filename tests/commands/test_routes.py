"""The endpoints of mlx_fun's server, and the shell over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_rigs import Served, said, serving

from mlxfun import Session
from mlxfun.generation.options import GenerateOptions

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

SECRET = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", params=["full", "lightweight"])
def served(request: pytest.FixtureRequest, root: Path) -> Iterator[Served]:
    with serving("load demo", count=request.param, output_root=root) as found:
        yield found


def shell_counts(questions: list[str], tokens: int) -> Any:
    """What the shell's own chat counts of the same questions, in conversations of their own."""
    session = Session.open("demo")
    session.set_counting(True)
    for question in questions:
        session.reset_chat()
        session.chat(question, GenerateOptions(max_tokens=tokens))
    stats = session.traffic_stats()
    session.close()
    return stats


def test_statistics_are_those_of_the_tokens_that_ran(served: Served) -> None:
    served.post("/v1/reap/reset", b"")
    questions = ["What is a mortgage?", "Name three colours.", "Who was Ada Lovelace?"]
    for question in questions:
        served.chat(question, max_tokens=6)
    status, stats, _ = served.get("/v1/reap/stats")
    assert status == 200
    expected = shell_counts(questions, 6)
    # The shell's last token is consumed by no forward, and here each is.
    assert stats["token_count"] == expected.tokens + len(questions)
    assert stats["request_count"] == 3
    assert (stats["num_layers"], stats["num_experts"]) == (6, 16)
    freq = np.array(stats["freq"])
    assert freq.sum() == stats["token_count"] * 6 * 2
    assert np.abs(freq - expected.sums["freq"]).sum() == len(questions) * 6 * 2
    scores = stats["computed_scores"]
    assert set(scores) == {"reap", "ean", "freq", "weighted_freq"}
    assert np.array(stats["weighted_freq_sum"]).sum() > 0
    if served.service.options.count == "full":
        more = np.array(stats["reap_sum"]) - expected.sums["reap_sum"]
        assert (more > -1e-2).all()
        assert np.array(scores["reap"]) == pytest.approx(
            np.array(stats["reap_sum"]) / np.maximum(freq, 1)
        )
    else:
        assert np.array(stats["reap_sum"]).sum() == 0


def test_cached_prefixes_are_counted_once(served: Served) -> None:
    served.post("/v1/reap/reset", b"")
    served.chat("Tell me of the sea.", max_tokens=4)
    first = served.get("/v1/reap/info")[1]["token_count"]
    served.chat("Tell me of the sea.", max_tokens=4)
    assert served.get("/v1/reap/info")[1]["token_count"] == first + 1 + 4


def test_concurrent_traffic_counts_each_position_once(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    served.run("stats reset")
    questions = [f"{word} " * n + "?" for n, word in enumerate("abcdefgh", 1)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: served.chat(q, max_tokens=10), questions))
    used = [answer["usage"] for answer in found]
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in used)
    info = served.get("/v1/reap/info")[1]
    assert info["token_count"] == sum(u["total_tokens"] for u in used) - cached
    freq = np.array(served.get("/v1/reap/stats")[1]["freq"])
    assert freq.sum() == info["token_count"] * 6 * 2


def test_steering_is_counted_too(served: Served) -> None:
    body = {"deactivate": {"0": [0, 1, 2], "5": [4]}, "activate": {"1": [3]}, "mask_value": -1e9}
    status, found, _ = served.post("/v1/reap/steer", body)
    assert (status, found["status"]) == (200, "steering_updated")
    try:
        _, now, _ = served.get("/v1/reap/steer")
        assert now["active"] is True
        assert now["config"]["deactivate"] == {"0": [0, 1, 2], "5": [4]}
        assert now["config"]["activate"] == {"1": [3]}
        assert served.get("/v1/reap/info")[1]["steering_active"] is True
        served.post("/v1/reap/reset", b"")
        served.chat(max_tokens=4)
        freq = np.array(served.get("/v1/reap/stats")[1]["freq"])
        assert freq.sum() > 0
        assert freq[0, :3].sum() == 0
        assert (freq[1, 3]) == served.get("/v1/reap/info")[1]["token_count"]
    finally:
        status, found, _ = served.post("/v1/reap/steer", b"", method="DELETE")
    assert found == {"status": "steering_removed"}
    assert served.get("/v1/reap/steer")[1] == {"active": False}


def test_a_scan_steers_and_paths_are_confined(served: Served, root: Path) -> None:
    if not (root / "report.json").exists():
        scan = "domain-scan --domain demo:python --general demo:medical --domain-name python"
        served.run(f"{scan} --output {root / 'report.json'}")
    status, found, _ = served.post("/v1/reap/steer", {"domain_map": "report.json", "mode": "boost"})
    assert status == 200, found
    assert found["config"]["activate"]
    served.post("/v1/reap/steer", b"", method="DELETE")
    for path in ("../report.json", str(root.parent / "x.npz"), "", "a\0b"):
        for where, name in (("save", "path"), ("steer", "safety_map")):
            if where == "save" and path == "":
                continue  # the default name
            status, found, _ = served.post(f"/v1/reap/{where}", {name: path})
            assert status == 400, (where, path, found)
    status, found, _ = served.post("/v1/reap/save", {"path": "online_saliency.npz"})
    assert found == {"status": "saved", "path": "online_saliency.npz"}
    assert served.run(f"stats load {root / 'online_saliency.npz'}").samples >= 1


def test_wrong_bodies_are_refused(served: Served) -> None:
    for body in (
        {"deactivate": {"99": [1]}},
        {"deactivate": {"0": [99]}},
        {"activate": [1]},
        {"mask_value": "x"},
        {"safety_map": 3},
        {"domain_map": "nothing.json", "mode": "safe"},
        {"safety_map": "nothing.json"},
    ):
        status, found, _ = served.post("/v1/reap/steer", body)
        assert 400 <= status < 500
        assert found["error"]["message"]
    assert served.get("/v1/reap/steer")[1] == {"active": False}


def test_statistics_are_saved_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "end.npz"
    with serving("load demo", count="full", auto_save=path) as served:
        served.chat(max_tokens=3)
    assert np.load(path)["freq"].sum() > 0


def test_state_history_and_plan(tmp_path: Path) -> None:
    with serving("load demo", "collect --dataset demo:mixed --max-samples 4") as served:
        state = served.get("/v1/mlxfun/state")[1]
        assert state["state"] == served.engine.view().state
        assert state["live"] == "base"
        assert served.get("/v1/mlxfun/plan")[1] == {"plan": None}
        served.run("prune --n-prune 2")
        plan = served.get("/v1/mlxfun/plan")[1]["plan"]
        assert len(plan["pruned"]) == 6
        assert served.get("/v1/mlxfun/state")[1]["sides"]["candidate"] == plan["state_after"]
        served.run("apply")
        nodes = served.get("/v1/mlxfun/history")[1]["nodes"]
        assert [node["command"] for node in nodes][-1].startswith("prune")
        status, found, _ = served.post("/v1/mlxfun/commands", {"command": "undo"})
        assert status == 403
        assert "--allow-commands" in found["error"]["message"]


def test_commands_run_with_the_token_and_edit_like_typed_ones(tmp_path: Path) -> None:
    options = {"commands": True, "token": "secret", "output_root": tmp_path}
    with serving("load demo", **options) as served:

        def run(line: str, headers: dict[str, str] = SECRET) -> tuple[int, Any]:
            status, found, _ = served.post("/v1/mlxfun/commands", {"command": line}, headers)
            return status, found

        assert run("undo", {})[0] == 401
        assert run("collect --dataset demo:mixed --max-samples 4")[0] == 200
        before = served.engine.view().state
        status, found = run("prune --n-prune 2")
        assert (status, found["ok"], found["data"]["kind"]) == (200, True, "plan")
        assert run("apply")[1]["state"] == served.engine.view().state != before
        assert run("undo")[1]["state"] == before
        status, found = run("undo")
        assert (status, found["ok"]) == (409, False)
        lens = run("lens --chat --layers 5 'What is the capital?'")[1]["data"]
        assert lens["kind"] == "lens"
        assert len(lens["words"][0]) == len(lens["tokens"])
        traced = run("trace --at layers.2.router.choice The capital")[1]["data"]
        assert len(traced["values"][0]["experts"]) == 2
        assert run("attention --layer 1 --all-heads The capital")[1]["data"]["kind"] == "head maps"
        for line in ("nonsense", "prune --n-prune x", "", "quit"):
            assert 400 <= run(line)[0] < 500
        assert not run(f"save {tmp_path.parent / 'outside'}")[1]["ok"]


def test_events_are_streamed() -> None:
    with serving("load demo", count="full") as served:
        address = served.server.address
        connection = http.client.HTTPConnection(address.host, address.port, timeout=30)
        connection.request("GET", "/v1/mlxfun/events")
        answer = connection.getresponse()
        assert answer.readline() == b": listening\n"
        served.chat(max_tokens=30)
        served.run("chat --max-tokens 3 Hello")
        seen: dict[str, Any] = {}
        # The end of the load may be heard too: listeners are told one after the other.
        while not seen.get("ended", {}).get("command", "").startswith("chat"):
            line = answer.readline()
            if line.startswith(b"data: "):
                found = json.loads(line.removeprefix(b"data: "))
                seen[found["event"]] = found
        connection.close()
        assert seen["token"]["text"]
        assert np.array(seen["routing"]["freq"]).sum() > 0


def test_chat_at_the_shell_takes_turns_with_requests(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = said(served.chat(max_tokens=150, logit_bias={"2": -100}))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.chat, max_tokens=150, logit_bias={"2": -100})
        while served.service.figures().in_flight == 0:
            pass
        report = served.run("chat --max-tokens 20 What is a mortgage?")
        assert report.generated_tokens == 20
        assert said(asked.result(timeout=60)) == alone
