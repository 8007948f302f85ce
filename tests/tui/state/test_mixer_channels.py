"""The steering mixer: channels, faders, and the one line they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from commands import registry
from mlxfun.scans.reports import ScanReport
from mlxfun.steering.options import MapInForce, ScanMap
from mlxfun.steering.reports import StandingView, SteerReport
from mlxfun.tracing.reports import VectorRow, VectorsReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tui.state import mixer_channels
from tui.state.mixer_channels import Channel
from tui.widgets.experts.mixer import fader, row


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
    line = mixer_channels.line(CHANNELS)
    assert line == "steer --clear --activate 0:3 --level 2:5=-1.5"
    assert registry.parse(line).params["levels"] == {2: {5: -1.5}}


def test_reports_are_steered_by_whole_with_their_strongest() -> None:
    channels = mixer_channels.with_report(CHANNELS, report("my python.json"))
    channels = mixer_channels.faded(mixer_channels.toggled(channels, 3), 3, -1)
    line = mixer_channels.line(channels)
    assert line.endswith("--domain-map 'my python.json' --domain-mode boost --max-experts 2")
    (use,) = registry.parse(line).params["maps"]
    assert (str(use.path), use.most) == ("my python.json", 2)
    assert (
        mixer_channels.line(mixer_channels.turned(channels, 3)).count("--domain-mode suppress") == 1
    )


def test_any_number_of_reports_is_on_each_with_its_way_and_its_fader() -> None:
    channels: mixer_channels.Channels = ()
    for path, technique in (("a.json", "domain"), ("b.json", "domain"), ("s.json", "safety")):
        channels = mixer_channels.with_report(channels, report(path, technique))
    for place in range(3):
        channels = mixer_channels.toggled(channels, place)
    assert [channel.on for channel in channels] == [True] * 3
    channels = mixer_channels.turned(mixer_channels.faded(channels, 0, -1), 1)
    line = mixer_channels.line(channels)
    assert line == (
        "steer --clear --domain-map a.json --domain-mode boost --max-experts 2 "
        "--domain-map b.json --domain-mode suppress --max-experts all "
        "--safety-map s.json --safety-mode safe --max-experts all"
    )
    assert registry.parse(line).params["maps"] == (
        ScanMap(Path("a.json"), "domain", "boost", 2),
        ScanMap(Path("b.json"), "domain", "suppress", None),
        ScanMap(Path("s.json"), "safety", "safe", None),
    )
    assert "--max-experts" not in mixer_channels.line(mixer_channels.faded(channels, 0, 1))
    assert "a.json" not in mixer_channels.line(mixer_channels.toggled(channels, 0))


def test_a_fader_ends_in_always_and_comes_back_from_there() -> None:
    channels = (Channel(True, "level", 0, 0, 11.5),)
    up = mixer_channels.faded(mixer_channels.faded(channels, 0, 1), 0, 1)
    assert (up[0].way, mixer_channels.line(up)) == ("in", "steer --clear --activate 0:0")
    back = mixer_channels.faded(up, 0, -1)
    assert (back[0].way, back[0].level) == ("level", 12.0)
    low = mixer_channels.faded((Channel(True, "level", 0, 0, -12.0),), 0, -1)
    assert mixer_channels.line(low) == "steer --clear --deactivate 0:0"


def test_a_fader_in_the_middle_steers_nothing() -> None:
    channels = mixer_channels.faded((Channel(True, "level", 0, 0, 0.5),), 0, -1)
    assert (channels[0].on, mixer_channels.line(channels)) == (False, "steer --clear")


def test_the_mixer_follows_steering_from_elsewhere_and_keeps_what_is_muted() -> None:
    steering = SteerReport({0: (3,), 4: (4,)}, {}, levels={2: {5: 2.0}})
    shown = mixer_channels.synced(CHANNELS, steering)
    assert [(c.on, c.way, c.key[2:], c.level) for c in shown] == [
        (True, "in", (0, 3), 0.0),
        (True, "level", (2, 5), 2.0),
        (False, "out", (1, 1), 0.0),
        (True, "in", (4, 4), 0.0),
    ]
    assert [c.on for c in mixer_channels.synced(shown, SteerReport({}, {}))] == [False] * 4


PYTHON = MapInForce("python.json", "domain", "boost", 2, ((0, 1), (0, 2), (3, 4)), ((0, 1), (3, 4)))


def test_a_reports_experts_get_no_channels_of_their_own() -> None:
    channels = mixer_channels.toggled(mixer_channels.with_report((), report()), 0)
    steering = SteerReport({0: (1, 7), 3: (4,)}, {0: (2,)}, maps=(PYTHON,))
    shown = mixer_channels.synced(channels, steering)
    # The third that it names it does not steer: that one is somebody else's, and shown.
    assert [(c.path, c.on, c.mode or c.way, c.layer, c.expert) for c in shown] == [
        ("python.json", True, "boost", 0, 0),
        ("", True, "in", 0, 7),
        ("", True, "out", 0, 2),
    ]
    off = mixer_channels.synced(shown[:1], SteerReport({0: (1,), 3: (4,)}, {}))
    assert [(c.path, c.on) for c in off] == [("python.json", False), ("", True), ("", True)]


def test_the_mixer_follows_reports_steered_from_elsewhere() -> None:
    channels: mixer_channels.Channels = ()
    for path in ("python.json", "b.json"):
        channels = mixer_channels.toggled(mixer_channels.with_report(channels, report(path)), 0)
    # Both name the same experts; only one is in force, in another way than here.
    use = replace(PYTHON, path="b.json", mode="suppress")
    shown = mixer_channels.synced(channels, SteerReport({}, {0: (1,), 3: (4,)}, maps=(use,)))
    assert [(c.path, c.on, c.mode, c.most) for c in shown] == [
        ("python.json", False, "boost", None),
        ("b.json", True, "suppress", 2),
    ]
    # A limit that limits nothing is none, and a report that nobody scanned here has a channel, too.
    safe = replace(PYTHON, path="s.json", kind="safety", mode="unsafe", most=3)
    shown = mixer_channels.synced((), SteerReport({}, {}, maps=(safe,)))
    assert [(c.path, c.on, c.kind, c.mode, c.most, c.named) for c in shown] == [
        ("s.json", True, "safety", "unsafe", None, 3)
    ]


def test_faders_are_drawn_from_the_middle() -> None:
    drawn = [fader(Channel(True, "level", level=x)).plain for x in (0.0, 0.5, 6.0, -6.0)]
    assert drawn == ["······│······", "······│█·····", "······│███···", "···███│······"]
    assert fader(Channel(True, "out")).plain == "██████│······"
    assert row(CHANNELS[1], 60).plain == "● L2:E5    ·····█│······ bias -1.5"
    assert row(CHANNELS[2], 60).plain == "○ L1:E1    ██████│······ force off"
    drawn_report = row(mixer_channels.with_report((), report())[0], 60).plain
    assert drawn_report == "○ boost    █████████████ 3 of 3  domain python.json"


def test_a_report_that_names_no_experts_has_no_channel() -> None:
    channels = mixer_channels.with_report((), report())
    assert len(channels) == 1
    assert mixer_channels.with_report(channels, replace(report(), more={})) == ()


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
        assert [c.key[2:] for c in shell.app.state.mixer] == [(2, 5)]
        await shell.press("plus")
        assert shell.engine.lines[-1] == "steer --clear --activate 0:0 --level 2:5=1.5"
        shell.app.state = replace(shell.app.state, cursor=(2, 5))
        await shell.press("minus")
        assert shell.engine.lines[-1] == "steer --clear --deactivate 2:5"

    drive(test)


def test_keys_of_the_map_leave_reports_what_they_are() -> None:
    both = ("--domain-map a.json --domain-mode boost --max-experts 2 "
            "--domain-map b.json --domain-mode suppress --max-experts all")  # fmt: skip

    @ready(*CALIBRATED, f"steer --activate 5:5 {both}")
    async def test(shell: Shell) -> None:
        assert [(c.path, c.on) for c in shell.app.state.mixer] == [
            ("", True), ("a.json", True), ("b.json", True),
        ]  # fmt: skip
        shell.app.state = replace(shell.app.state, cursor=(1, 9))
        await shell.press("plus")
        assert shell.engine.lines[-1] == f"steer --clear --activate 1:9,5:5 {both}"
        shell.engine.finish()
        await shell.settle()
        await shell.press("0")
        assert shell.engine.lines[-1] == f"steer --clear --activate 5:5 {both}"
        shell.engine.finish()
        await shell.settle()
        # An expert of the reports cannot be spared by them: the others are named one by one.
        shell.app.state = replace(shell.app.state, cursor=(0, 2))
        await shell.press("0")
        assert shell.engine.lines[-1] == ("steer --clear --activate 5:5 --deactivate 0:1,3:4")

    drive(test)


def test_two_reports_are_switched_on_by_keys() -> None:
    class Scanning(FakeEngine):
        def _scripted(self, job, line):
            if line.startswith("domain-scan"):
                yield report(line.split()[-1])
            else:
                yield from super()._scripted(job, line)

    @ready("domain-scan --output a.json", "domain-scan --output b.json")
    async def test(shell: Shell) -> None:
        await shell.press("7", "space", "down", "enter", "space", "minus")
        shell.engine.finish()
        await shell.settle()
        assert shell.engine.lines[-1] == (
            "steer --clear --domain-map a.json --domain-mode boost --max-experts all "
            "--domain-map b.json --domain-mode suppress --max-experts 2"
        )
        assert [(c.on, c.mode, c.most) for c in shell.app.state.mixer] == [
            (True, "boost", None),
            (True, "suppress", 2),
        ]

    drive(test, engine=Scanning())


def test_a_steering_that_is_refused_leaves_the_mixer_as_the_model_is() -> None:
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


VECTORS = VectorsReport(
    (VectorRow("kind", "mean", ((3, 1.0), (4, 2.0)), ((3, 0.9), (4, 0.75)), "a1b2", 8, 8),), ()
)


def standing(strength: float, source: str = "kind") -> SteerReport:
    view = StandingView("layers.3.residual", "add_vector", source, "key", strength)
    other = StandingView("layers.1.mlp.output", "zero", "", "other")
    return SteerReport({}, {}, interventions=(view, other))


def test_a_vector_gets_a_muted_channel_at_its_best_layer_and_follows_what_stands() -> None:
    (channel,) = channels = mixer_channels.after_job((), None, VECTORS)
    assert (channel.on, channel.vector, channel.layer, channel.level) == (False, "kind", 3, 1.0)
    assert mixer_channels.after_job(channels, None, VECTORS) == channels
    (channel,) = mixer_channels.synced(channels, standing(2.5))
    assert (channel.on, channel.level) == (True, 2.5)
    (channel,) = mixer_channels.synced((channel,), None)
    assert (channel.on, channel.level) == (False, 2.5)
    # One that was put in force by a command, from a file.
    (channel,) = mixer_channels.synced((), standing(-1.0, "v ec.safetensors"))
    assert (channel.on, channel.vector) == (True, "v ec.safetensors")


def test_a_vectors_keys_say_its_own_line_and_leave_the_experts_alone() -> None:
    expert = Channel(True, "level", 1, 2, 3.0)
    before = (expert, Channel(False, layer=3, level=1.0, vector="kind"))

    def said(after: tuple[Channel, ...], now: tuple[Channel, ...] = before) -> str:
        return mixer_channels.changed_line(now, after, 1, None)

    on = mixer_channels.toggled(before, 1)
    assert said(on) == "vector use kind --layer 3 --strength 1"
    assert said(mixer_channels.faded(before, 1, 1)) == said(on)
    assert said(mixer_channels.faded(on, 1, 1), on) == "vector use kind --layer 3 --strength 1.25"
    assert said(mixer_channels.turned(on, 1), on) == "vector use kind --layer 3 --strength -1"
    assert said(mixer_channels.faded(on, 1, -4), on) == "intervene layers.3.residual --clear"
    assert (
        said(mixer_channels.toggled(on, 1), on)
        == said(mixer_channels.removed(on, 1), on)
        == said(mixer_channels.faded(on, 1, -4), on)
    )
    assert said(mixer_channels.removed(before, 1)) == ""
    assert mixer_channels.faded(on, 1, 1000)[1].level == 8.0
    assert "kind" not in mixer_channels.line(on)
    assert (
        mixer_channels.changed_line(on, mixer_channels.faded(on, 0, 1), 0, None)
        == "steer --clear --level 1:2=3.5"
    )


def test_vectors_are_moved_by_keys() -> None:
    class Making(FakeEngine):
        def _scripted(self, job, line):
            if line.startswith("vector make"):
                yield VECTORS
            elif line.startswith("vector use"):
                yield standing(float(line.split()[-1]))
            else:
                yield from super()._scripted(job, line)

    @ready("vector make kind")
    async def test(shell: Shell) -> None:
        assert [c.vector for c in shell.app.state.mixer] == ["kind"]
        await shell.press("7", "space")
        assert shell.engine.lines[-1] == "vector use kind --layer 3 --strength 1"
        assert "+1.00  vector kind" in shell.screen

    drive(test, engine=Making())


def test_a_row_of_the_mixer_is_one_line_however_narrow_the_panel() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        long = replace(report(), path="a/rather/long/name/of/a/report.json")
        state = replace(shell.app.state, mixer=mixer_channels.with_report((), long))
        shell.app._change(state)
        await shell.press("7")
        shown = [line for line in shell.screen.splitlines() if "boost" in line or "json" in line]
        assert len(shown) == 1
        assert "3 of 3  " in shown[0]

    drive(test, size=(112, 32))
