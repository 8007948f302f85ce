"""Tasks of lm-evaluation-harness on the resident model, handed over through `mlx_lm.evaluate`.

The harness asks for log-likelihoods and answers; mlx_lm's own adapter gives them, with the model that
is live here in place of one that it would load. What the harness needs beyond that (task files, data
sets) it finds as it does anywhere, for most tasks on the Hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.errors import DatasetError, MlxfunError, UsageError
from mlxfun.evaluation.task_options import TaskOptions, TaskRow
from mlxfun.hooks.intercept import Hooks

if TYPE_CHECKING:
    from types import ModuleType

    from mlxfun.data.datasets import Tokenizer

MISSING = (
    "tasks are run by lm-evaluation-harness, which is not installed: pip install 'mlxfun[eval]'"
)


def require_harness() -> ModuleType:
    """The harness. Raises UsageError where it is not installed."""
    try:
        # An extra, and slow to import.
        import lm_eval
    except ImportError as error:
        raise UsageError(MISSING) from error
    found: ModuleType = lm_eval
    return found


def run_tasks(
    model: nn.Module, tokenizer: Tokenizer, options: TaskOptions, ctx: Context = SILENT
) -> tuple[tuple[TaskRow, ...], str]:
    """(metrics of every task, the harness' version), of the live weights with what steers them.

    Raises UsageError for unknown tasks or without the harness, DatasetError for data sets that cannot
    be had, Cancelled between two forwards.
    """
    if not options.names:
        raise UsageError("name at least one task, e.g. tasks arc_easy")
    ctx.check()
    harness = require_harness()
    with _quiet(), _counted(model, ctx):
        try:
            manager = _manager(options)
            _require_known(manager, options.names)
            found: Any = harness.simple_evaluate(
                model=_adapter(model, tokenizer, options),
                tasks=list(options.names),
                num_fewshot=options.shots,
                limit=options.limit,
                apply_chat_template=options.as_chat,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
                random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except MlxfunError:
            raise
        # Foreign code: a task may fail in any way, most often for want of its data set.
        except Exception as error:
            raise DatasetError(
                f"the harness could not run {', '.join(options.names)}: {type(error).__name__}: "
                f"{str(error)[:300]}"
            ) from error
    version = str(getattr(harness, "__version__", ""))
    return _rows(found), version


def _adapter(model: nn.Module, tokenizer: Tokenizer, options: TaskOptions) -> Any:
    """mlx_lm's adapter around the model that is here."""
    # It imports the harness.
    from lm_eval.api.model import LM
    from mlx_lm.evaluate import MLXLM, _lstrip, _rstrip_until
    from mlx_lm.generate import batch_generate

    class Resident(MLXLM):
        """MLXLM without its loading, its progress bars and its distribution over processes."""

        def __init__(self) -> None:
            LM.__init__(self)
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size = options.max_tokens, options.batch
            self.use_chat_template, self._sampler = options.as_chat, None

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            if not requests:
                return []
            asked = [request.args for request in requests]
            special = not self.use_chat_template
            made = batch_generate(
                model=model,
                tokenizer=tokenizer,
                prompts=[tokenizer.encode(text, add_special_tokens=special) for text, _ in asked],
                max_tokens=[
                    options.max_tokens or how.get("max_gen_toks", LONGEST) for _, how in asked
                ],
                verbose=False,
                prefill_batch_size=options.batch,
                completion_batch_size=options.batch,
            ).texts
            ended = [
                _rstrip_until(text, how["until"])
                for text, (_, how) in zip(made, asked, strict=True)
            ]
            thinks = getattr(tokenizer, "has_thinking", False)
            return [_lstrip(t, tokenizer.think_end) if thinks else t for t in ended]  # type: ignore[attr-defined]

    return Resident()


LONGEST = 256
"""Tokens of an answer where neither the task nor the options say."""


def _manager(options: TaskOptions) -> Any:
    from lm_eval.tasks import TaskManager  # the harness, an extra

    include = None if options.include is None else str(options.include)
    return TaskManager(include_path=include)


def _require_known(manager: Any, names: Sequence[str]) -> None:
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = sorted(n for n in known if any(n.startswith(u[:4]) for u in unknown))[:5]
        hint = f"; near are {', '.join(near)}" if near else ""
        raise UsageError(f"the harness knows no task {', '.join(unknown)}{hint}")


def _rows(found: Mapping[str, Any]) -> tuple[TaskRow, ...]:
    """Every metric of every task: the harness calls it "metric,filter", its error "metric_stderr,filter"."""
    rows = []
    samples = found.get("n-samples", {})
    for task, figures in found["results"].items():
        count = samples.get(task, {})
        documents = int(count.get("effective", 0)) if isinstance(count, dict) else 0
        for name, value in figures.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            known = float(error) if isinstance(error, int | float) else None
            rows.append(TaskRow(task, shown, float(value), known, documents))
    return tuple(rows)


@contextmanager
def _counted(model: nn.Module, ctx: Context) -> Iterator[None]:
    """Forwards inside the block are counted as progress, and a cancel acts between two of them."""
    done = 0

    def forward(own: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        ctx.check()
        done += 1
        ctx.progress("running tasks", done, None, "forwards")
        return own(*args, **kwargs)

    hooks = Hooks({"": model})
    hooks.on_call("", forward, required=False)
    with hooks:
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness shows no progress bars and logs nothing inside the block: they would be drawn over
    the screen."""
    from tqdm import tqdm  # comes with the Hub's client

    own, level = tqdm.__init__, logging.root.manager.disable

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        tqdm.__init__ = own
        logging.disable(level)
