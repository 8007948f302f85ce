"""The steering mixer: channels, faders, and the one line they make."""

from __future__ import annotations

from dataclasses import replace

from commands import registry
from mlxfun.comparison_reports import ScanReport
from mlxfun.reports import SteerReport
from tests.tui.driving import Shell, drive, ready
from tui import mixer
from tui.mixer import Channel
from tui.widgets.mixer import fader, row


def report(path: str = "python.json", technique: str = "domain") -> ScanReport:
    return ScanReport(
        technique, "python", path, "s", "a", "b", (1, 1), (1, 1), 96, 90.0, 0.01,
        {0: (1, 2), 3: (4,)}, {5: (9,)}, 4, (),
    )  # fmt: skip


CHANNELS = (
    Channel(True, "in", 0, 3),
    Channel(True, "level", 2, 5, -1.5),
    Channel(False, "out", 1, 1),
)


def test_the_line_names_what_is_on_and_parses() -> None:
    line = mixer.line(CHANNELS)
    assert line == "steer --clear --activate 0:3 --level 2:5=-1.5"
    assert registry.parse(line).params["levels"] == {2: {5: -1.5}}


def test_reports_are_steered_by_whole_with_their_strongest() -> None:
    channels = mixer.with_report(CHANNELS, report("my python.json"))
    channels = mixer.faded(mixer.toggled(channels, 3), 3, -2)
    line = mixer.line(channels)
    assert line.endswith("--domain-map 'my python.json' --domain-mode boost --max-experts 2")
    params = registry.parse(line).params
    assert (str(params["domain_map"]), params["max_experts"]) == ("my python.json", 2)
    assert mixer.line(mixer.turned(channels, 3)).count("--domain-mode suppress") == 1


def test_of_two_reports_of_a_kind_one_works_at_a_time() -> None:
    channels = mixer.with_report(mixer.with_report((), report("a.json")), report("b.json"))
    channels = mixer.toggled(mixer.toggled(channels, 0), 1)
    assert [channel.on for channel in channels] == [False, True]


def test_a_fader_ends_in_always_and_comes_back_from_there() -> None:
    channels = (Channel(True, "level", 0, 0, 11.5),)
    up = mixer.faded(mixer.faded(channels, 0, 1), 0, 1)
    assert (up[0].way, mixer.line(up)) == ("in", "steer --clear --activate 0:0")
    back = mixer.faded(up, 0, -1)
    assert (back[0].way, back[0].level) == ("level", 12.0)
    low = mixer.faded((Channel(True, "level", 0, 0, -12.0),), 0, -1)
    assert mixer.line(low) == "steer --clear --deactivate 0:0"


def test_a_fader_in_the_middle_steers_nothing() -> None:
    channels = mixer.faded((Channel(True, "level", 0, 0, 0.5),), 0, -1)
    assert (channels[0].on, mixer.line(channels)) == (False, "steer --clear")


def test_the_mixer_follows_steering_from_elsewhere_and_keeps_what_is_muted() -> None:
    steering = SteerReport({0: (3,), 4: (4,)}, {}, levels={2: {5: 2.0}})
    shown = mixer.synced(CHANNELS, steering)
    assert [(c.on, c.way, c.key[1:], c.level) for c in shown] == [
        (True, "in", (0, 3), 0.0),
        (True, "level", (2, 5), 2.0),
        (False, "out", (1, 1), 0.0),
        (True, "in", (4, 4), 0.0),
    ]
    assert [c.on for c in mixer.synced(shown, SteerReport({}, {}))] == [False] * 4


def test_a_reports_experts_get_no_channels_of_their_own() -> None:
    channels = mixer.toggled(mixer.with_report((), report()), 0)
    shown = mixer.synced(channels, SteerReport({0: (1, 2), 3: (4,)}, {}))
    assert [c.path for c in shown] == ["python.json"]
    assert shown[0].on
    off = mixer.synced(shown, SteerReport({1: (1,)}, {}))
    assert [(c.path, c.on) for c in off] == [("python.json", False), ("", True)]


def test_faders_are_drawn_from_the_middle() -> None:
    drawn = [fader(Channel(True, "level", level=x)).plain for x in (0.0, 0.5, 6.0, -6.0)]
    assert drawn == ["······│······", "······│█·····", "······│███···", "···███│······"]
    assert fader(Channel(True, "out")).plain == "██████│······"
    assert row(CHANNELS[1], 60).plain == "● L2:E5    ·····█│······ -1.5"
    assert row(CHANNELS[2], 60).plain == "○ L1:E1    ██████│······ always out"
    drawn_report = row(mixer.with_report((), report())[0], 60).plain
    assert drawn_report == "○ boost    █████████████ 4 of 4  domain python.json"


def test_an_expert_is_brought_from_the_map_and_faded_while_an_answer_runs() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("chat hello")
        shell.engine.step(3)
        await shell.settle()
        await shell.press("right", "M")
        assert shell.app.main.focused_panel == "mixer"
        await shell.press("plus", "plus", "space")
        assert shell.engine.lines[-4:] == [
            "steer --clear --level 0:1=0.5",
            "steer --clear --level 0:1=1",
            "steer --clear --level 0:1=1.5",
            "steer --clear",
        ]
        shell.engine.finish()
        await shell.settle()
        # An older answer of the engine does not move the fader back.
        assert [(c.on, c.level) for c in shell.app.state.mixer] == [(False, 1.5)]
        await shell.press("space")
        assert shell.engine.lines[-1] == "steer --clear --level 0:1=1.5"

    drive(test)


def test_steering_keys_of_the_map_keep_the_faders() -> None:
    @ready("steer --level 2:5=1.5")
    async def test(shell: Shell) -> None:
        assert [c.key[1:] for c in shell.app.state.mixer] == [(2, 5)]
        await shell.press("plus")
        assert shell.engine.lines[-1] == "steer --clear --activate 0:0 --level 2:5=1.5"
        shell.app.state = replace(shell.app.state, cursor=(2, 5))
        await shell.press("minus")
        assert shell.engine.lines[-1] == "steer --clear --deactivate 2:5"

    drive(test)


def test_a_steering_that_is_refused_leaves_the_mixer_as_the_model_is() -> None:
    from tests.fake_engine import FakeEngine

    class Refusing(FakeEngine):
        def _do_steer(self, job, args):
            raise ValueError("layer 0: expert 0 is pruned in the live model")
            yield

    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("M")
        shell.engine.finish()
        await shell.settle()
        assert [c.on for c in shell.app.state.mixer] == [False]
        assert "is pruned in the live model" in shell.echo

    drive(test, engine=Refusing())
