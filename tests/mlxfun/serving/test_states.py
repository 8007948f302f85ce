"""No answer mixes two states: edits wait for requests in flight, or break them off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_rigs import Served, events, said, serving, streamed

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

LONG = {"max_tokens": 24, "temperature": 0, "logit_bias": {"2": -100}}  # it does not end by itself


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo", "collect --dataset demo:mixed --max-samples 8") as found:
        yield found


def reference(served: Served, side: str, **more: Any) -> str:
    return said(served.chat(model=side, **LONG | more))


def test_eight_clients_while_somebody_stages_flips_applies_and_undoes(served: Served) -> None:
    base = reference(served, "live")
    before = served.get("/v1/models")[1]["data"][0]["mlxfun"]["state"]
    served.run("prune --n-prune 6")
    pruned = reference(served, "candidate")
    after = served.chat(model="candidate")["mlxfun"]["state"]
    assert base != pruned
    assert before != after
    served.run("discard")
    texts = {before: base, after: pruned}
    stop = threading.Event()

    def client(_number: int) -> list[tuple[str, str]]:
        found = []
        while not stop.is_set():
            body = {"messages": [{"role": "user", "content": "What is a mortgage?"}]} | LONG
            status, text, headers = served.post("/v1/chat/completions", body | {"stream": True})
            assert status == 200
            chunks = events(text)
            named = {c["mlxfun"]["state"] for c in chunks if "mlxfun" in c}
            assert named == {headers["x-mlxfun-state"]}
            found.append((named.pop(), streamed(chunks)))
        return found

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, n) for n in range(8)]
        for line in ("prune --n-prune 6", "flip", "flip", "apply", "undo", "redo", "undo"):
            served.run(line)
        stop.set()
        answers = [answer for one in clients for answer in one.result(timeout=60)]
    assert {state for state, _ in answers} == {before, after}  # both were asked
    assert all(text == texts[state] for state, text in answers)


def test_both_sides_of_a_staged_plan_answer_at_once(served: Served) -> None:
    served.run("prune --n-prune 6")
    try:
        alone = {side: reference(served, side) for side in ("base", "candidate")}
        with ThreadPoolExecutor(6) as pool:
            asked = [(side, pool.submit(reference, served, side)) for side in [*alone] * 3]
            for side, answer in asked:
                assert answer.result(timeout=60) == alone[side]
        assert served.engine.view().live == "candidate"
    finally:
        served.run("discard")


def test_a_candidate_that_is_not_staged_is_refused(served: Served) -> None:
    status, found, _ = served.post(
        "/v1/chat/completions",
        {"model": "candidate", "messages": [{"role": "user", "content": "x"}]},
    )
    assert status == 409
    assert "nothing is staged" in found["error"]["message"]


def test_steering_of_one_request_touches_no_other(served: Served) -> None:
    layer = served.engine.view().heat.layers[0]
    steer = {"mlxfun": {"steer": {"deactivate": {str(layer): list(range(8))}}}}
    plain, steered = reference(served, "live"), reference(served, "live", **steer)
    assert plain != steered
    with ThreadPoolExecutor(6) as pool:
        asked = [(more, pool.submit(reference, served, "live", **more)) for more in [{}, steer] * 3]
        for more, answer in asked:
            assert answer.result(timeout=60) == (steered if more else plain)
    assert served.engine.view().steered == ""


def test_steering_at_the_shell_holds_for_the_next_request_and_not_for_cached_prompts(
    served: Served,
) -> None:
    plain = reference(served, "live")
    layer = served.engine.view().heat.layers[0]
    served.run(f"steer --deactivate {layer}:0..7")
    steered = reference(served, "live")
    served.run("undo")
    assert steered != plain
    assert reference(served, "live") == plain


def test_abort_breaks_answers_off_before_an_edit() -> None:
    options = {"on_edit": "abort"}
    with serving("load demo", "collect --dataset demo:mixed --max-samples 4", **options) as served:
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        body |= {"max_tokens": 400, "logit_bias": {"2": -100}}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(served.post, "/v1/chat/completions", body)
            while served.service.figures().completion_tokens < 3:
                pass
            served.run("prune --n-prune 2")
            status, text, _ = answer.result(timeout=60)
        chunks = events(text)
        assert status == 200
        assert chunks[-1]["error"]["code"] == 503
        assert "edited" in chunks[-1]["error"]["message"]


def test_a_drain_lets_answers_end_first() -> None:
    with serving("load demo", "collect --dataset demo:mixed --max-samples 4") as served:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(served.chat, max_tokens=200, logit_bias={"2": -100})
            while served.service.figures().completion_tokens < 3:
                pass
            served.run("prune --n-prune 2")
            found = answer.result(timeout=60)
        assert found["usage"]["completion_tokens"] == 200
        assert found["mlxfun"]["side"] == "base"


def test_a_model_that_is_loaded_anew_answers(served: Served) -> None:
    with serving() as empty:
        status, found, _ = empty.get("/health")
        assert (status, found["status"]) == (503, "unavailable")
        assert empty.post("/v1/chat/completions", {"messages": []})[0] == 503
        for _ in range(2):
            empty.run("load demo")
            assert said(empty.chat(max_tokens=4)) == said(served.chat(max_tokens=4))
