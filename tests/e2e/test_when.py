"""What a command's `when` says of a state is what the engine does in that state."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import registry
from commands.declare import Call
from commands.registry import COMMANDS
from commands.workbench.files import Files
from commands.workbench.journal import Journal
from commands.workbench.settings import Settings
from commands.workbench.wiring import Wiring
from commands.workbench.workbench import Workbench
from mlxfun.context import SILENT, Context
from mlxfun.errors import Cancelled, MlxfunError, PlanError, StateError
from mlxfun.generation.reports import ChatReport
from mlxfun.session.session import Session
from tests.mlxfun import tiny_checkpoints

DENSE = {**tiny_checkpoints.COMMON, "model_type": "qwen3"}
EXPERTS = {**tiny_checkpoints.QWEN3, "num_experts": 16, "num_hidden_layers": 3}
TEXT = "--max-samples 2 --max-tokens 24"
SETS = "--harmful demo:harmful --harmless demo:harmless --max-samples 16"
COLLECT, PRUNE = f"collect --dataset demo:mixed {TEXT}", "prune --n-prune 4"
SEEN = "stats load s.npz"
"""Statistics as COLLECT makes them, without its forwards; no line below needs more of them."""
MERGE = f"merge --dataset demo:mixed {TEXT} --n-prune 4"

STATES = {
    "no model": (),
    "dense": ("load dense",),
    "loaded": ("load small",),
    "with statistics": ("load small", COLLECT),
    "staged": ("load small", SEEN, PRUNE),
    "staged, flipped": ("load small", SEEN, PRUNE, "flip"),
    "selected, uneven": ("load small", "select --drop 0:1"),
    "merge staged": ("load small", MERGE),
    "applied": ("load small", SEEN, PRUNE, "apply"),
    "applied, staged again": (
        "load small", SEEN, PRUNE, "apply", "prune --n-prune 2 --allow-stale",
    ),
    "merge applied": ("load small", MERGE, "apply"),
    "compacted": ("load small", SEEN, PRUNE, "apply", "compact"),
    "compacted, undone": ("load small", SEEN, PRUNE, "apply", "compact", "undo"),
    "undone": ("load small", SEEN, PRUNE, "apply", "undo"),
    "undone, staged": ("load small", SEEN, PRUNE, "apply", "undo", PRUNE),
    "steered": ("load small", "steer --deactivate 1:2"),
    "biased": ("load small", "steer --level 0:1=1.5"),
    "steered and staged": ("load small", SEEN, PRUNE, "steer --deactivate 1:9"),
    "steered and applied": ("load small", "steer --deactivate 1:9", SEEN, PRUNE, "apply"),
    "steering cleared": ("load small", "steer --level 0:1=1.5", "steer --clear"),
    "chatted": ("load small", "chat --max-tokens 1 hello"),
    "partly resident": ("load small --capacity 4",),
    "partly resident, staged": ("load small --capacity 4", SEEN, PRUNE),
}  # fmt: skip

LINES = {
    "residency": "residency", "residency sweep": "residency sweep --max-tokens 2",
    "profile save": "profile save q.json", "profile load": "profile load profile.json",
    "info": "info", "workers": "workers", "layers": "layers", "save": "save out --force", "smoke-test": "smoke-test",
    "stats show": "stats show", "stats save": "stats save t.npz",
    "stats load": "stats load s.npz", "stats count": "stats count on",
    "stats reset": "stats reset", "why": "why 0:1",
    "safety-scan": "safety-scan --harmful demo:harmful --benign demo:harmless --max-samples 4 --output a.json",
    "domain-scan": "domain-scan --domain demo:python --general demo:mixed --domain-name x "
    "--max-samples 4 --output b.json",
    "prune": "prune --expert-list list.json --allow-stale", "merge": MERGE,
    "narrow": f"narrow --dataset demo:mixed {TEXT} --fraction 0.25",
    "bits": f"bits --to-bytes 1.2MB --dataset demo:mixed {TEXT}",
    "tasks": "tasks nothing",
    "distil": f"distil --dataset demo:mixed {TEXT}",
    "plan show": "plan show", "plan save": "plan save p.json", "steer": "steer --activate 2:3",
    "apply": "apply", "discard": "discard", "flip": "flip", "compact": "compact",
    "select": "select --drop 0:3", "probe": "probe --dataset demo:eval",
    "dossier": "dossier 0:1 --dataset demo:eval", "abliterate": f"abliterate {SETS}",
    "refusals": f"refusals {SETS}", "bake": f"bake --dataset demo:mixed {TEXT}",
    "amplify": f"amplify --domain-map domain.json --dataset demo:mixed {TEXT} --allow-stale",
    "evaluate": f"evaluate --dataset demo:eval {TEXT}",
    "preview": f"preview --dataset demo:eval {TEXT}", "chat": "chat --max-tokens 1 hi",
    "ab": "ab --max-tokens 1 hi", "undo": "undo", "redo": "redo", "goto": "goto 0",
    "history": "history", "name": "name 0 x",
    "compare": f"compare 0 0 --dataset demo:eval {TEXT}",
    "topics": "topics --dataset demo:eval", "export topics": "export topics t.csv --force",
    "export heatmap": "export heatmap h.csv --force",
    "export report": "export report r.md --force", "export chat": "export chat c.md --force",
    "trace": "trace hello", "difference": "difference hello", "lens": "lens hello there",
    "attention": "attention hello there", "patch": 'patch "one two" "one tax" --metric kl',
    "attribute": "attribute hello there",
    "activations save": f"activations save a.safetensors --dataset demo:mixed {TEXT}",
    "tune-lens": f"tune-lens l.safetensors --dataset demo:mixed {TEXT}",
    "sae train": f"sae train sae --at layers.1.residual --k 4 --dataset demo:mixed {TEXT}",
    "probe-train": f"probe-train --class a=demo:python --class b=demo:medical {TEXT}",
    "vector make": f"vector make v --positive demo:python --negative demo:medical {TEXT}", "vector list": "vector list", "intervene": "intervene layers.1.mlp.output scale 0.5",
    "serve": "serve",
    "collect": COLLECT,  # the last: cancelled at once it leaves statistics of no samples
}  # fmt: skip
"""For each command that a session is needed for, a line that is right if the state is."""

SHELL = {
    "load", "models", "plan", "recover", "stats diff", "stats merge", "stats rank", "stats purge", "stats subtract", "prepare-dataset", "dataset",
    "recipe", "compress", "tokens", "vector use", "vector save", "sae features", "sae use", "set", "record", "replay", "resume", "expect", "help", "quit",
}  # fmt: skip
"""Commands that no state of the session keeps from running; those of vectors go by their names, those of autoencoders by files."""

STANDS_ALONE = {("export chat", name) for name in STATES if name not in ("no model", "chatted")}
"""What was said is the shell's, and not part of the view that `when` looks at."""


class Begun(Context):
    """Cancels a command as soon as it begins to work: it has not been refused."""

    def check(self) -> None:
        raise Cancelled("it has begun")


def make() -> Workbench:
    wiring = Wiring(lambda _: Session, lambda *_: None, registry.meant, registry.help_text)
    bench = Workbench(
        wiring, journal=Journal(0), settings=Settings(), files=Files(), undo_budget=None
    )
    bench.identities = Path("identities.json").absolute()
    return bench


def run(bench: Workbench, line: str, ctx: Context = SILENT) -> None:
    parsed = registry.parse(line)
    bench.name(line)
    report = parsed.command.handler(Call(bench, parsed.params, ctx))
    if isinstance(report, ChatReport):
        bench.answers.append(report)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the files that the lines name."""
    directory = tmp_path_factory.mktemp("when")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        tiny_checkpoints.write(directory / "dense", DENSE)
        tiny_checkpoints.write(directory / "small", EXPERTS)
        bench = make()
        scan = "domain-scan --domain demo:python --general demo:medical --domain-name python"
        for line in (
            "load small", COLLECT, "stats save s.npz", "profile save profile.json", PRUNE, "plan save list.json",
            f"{scan} --max-samples 8 --max-tokens 24 --output domain.json",
        ):  # fmt: skip
            run(bench, line)
        bench.close()
        gc.collect()
        gc.freeze()  # or each of the sessions that close goes over all that has been imported
        yield directory


def test_every_command_is_tried() -> None:
    assert set(LINES) | SHELL == set(COMMANDS)


@pytest.mark.parametrize("name", STATES)
def test_when_agrees_with_the_engine(name: str, files: Path) -> None:
    bench, before, wrong = make(), None, []
    for command, line in LINES.items():
        if before is None or before != standing(bench):
            bench.close()
            bench = make()
            for step in STATES[name]:
                run(bench, step)
            before = standing(bench)
        reason = COMMANDS[command].when(bench.view())
        refusal = refused(bench, line)
        if reason is None and isinstance(refusal, StateError):
            if (command, name) not in STANDS_ALONE:
                wrong.append(f"{command}: enabled, but {refusal}")
        elif reason is not None and refusal is None:
            wrong.append(f"{command}: the engine does it, though {reason}")
    bench.close()
    assert wrong == []


def standing(bench: Workbench) -> tuple[object, ...]:
    """All that a command may change which another one depends on."""
    view = bench.view()
    samples = view.heat.samples if view.heat else None
    return (
        view.state,
        view.live,
        view.plan,
        view.history,
        view.steering,
        samples,
        len(bench.answers),
    )


def refused(bench: Workbench, line: str) -> MlxfunError | None:
    """Why `line` does not run, None when it does. A PlanError speaks of the plan, not the state."""
    try:
        run(bench, line, Begun())
    except (StateError, PlanError) as problem:
        return problem
    except Cancelled:
        return None
    return None
