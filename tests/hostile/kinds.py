"""The kinds of files that the program reads: a good one of each, who reads it, how it is spoiled."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxfun.data import demo
from tests.hostile import damage, damage_binary
from tests.hostile.damage import (
    DEEP_LIST,
    DEEP_OBJECT,
    DIGITS,
    ESCAPE,
    LONG,
    NO_LISTS,
    NO_NUMBERS,
    NO_OBJECTS,
    NO_SIZES,
    NO_TEXTS,
    TEXT,
    Damage,
    changed,
    texts,
    with_line,
    without,
)
from tests.hostile.warm import Warm


@dataclass(frozen=True)
class Kind:
    """file: in the place. lines: what reads it, or arguments of the program. share: of 100."""

    file: str
    lines: tuple[str, ...]
    damages: tuple[Damage, ...]
    share: int = 100
    arguments: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The arguments of the program."""
        if self.arguments:
            return list(self.arguments)
        return ["--headless", *[word for line in self.lines for word in ("-c", line)]]

    def damaged(self, good: bytes, seed: int) -> bytes:
        """All ways of damage in turn, each with other numbers every time."""
        return self.damages[seed % len(self.damages)](good, random.Random(seed))


SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    "max_position_embeddings",
)  # fmt: skip
EXPERT_TABLE = ({"99": [0]}, {"-1": [0]}, {"x": [0]}, {"0": [99]}, {"0": [-1]}, {"0": [1.5]},
                {"0": [True]}, {"0": ["x"]}, {"0": 3}, {"0": None}, *NO_OBJECTS)  # fmt: skip
HELPERS = (
    "cache",
    "base",
    "rope_utils",
    "switch_layers",
    "os",
    "../../x",
    "a.b",
    LONG,
    ESCAPE,
    "\0",
)
LINES = ("no-such-command", "prune --n-prune", "prune --n-prune x", "set metric nothing",
         "prune --no-such-option 1", 'stats save "not closed', '"\\x"', '"[1]', "#: seed x",
         "#: unknown value", "#= nonsense", b"\xff\xfe", b"chat \xc0\x80", "[" * 5000,
         '"' + "9" * 9000, "x" * 100_000, f"no{ESCAPE}")  # fmt: skip

CONFIG = (
    *TEXT,
    *changed(*[(name, NO_SIZES) for name in SIZES]),
    *changed(*[(name, (3, 7, 1)) for name in SIZES[:8]]),
    *changed(("num_experts_per_tok", (17, 0, 2**16)), ("model_type", (*HELPERS, *NO_TEXTS))),
    *changed(("rms_norm_eps", (*NO_NUMBERS, -1, 2, float("nan"))),
             ("rope_theta", (*NO_NUMBERS, -1, 0, float("inf"), 10**400)),
             ("norm_topk_prob", (5, "x", [], {})), ("tie_word_embeddings", ("x", 7, [])),
             ("rope_scaling", (5, "x", [1], {"type": 5}, {"type": "linear", "factor": "x"})),
             ("architectures", (5, {}, [5], [[]], [None])),
             ("decoder_sparse_step", (0, -1, "x", [], 1.5)), ("mlp_only_layers", (5, "x", ["x"]))),
    *without("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_experts"),
    *texts(DEEP_LIST, DEEP_OBJECT, DIGITS, b'{"model_type": ' + DIGITS + b"}"),
)  # fmt: skip
TOKENIZER = (
    *TEXT,
    *changed(("model", (*NO_OBJECTS, {}, {"type": "x"}, None)), ("model.vocab", (5, "x", [[]], None)),
             ("model.type", (*NO_TEXTS, "no such type")), ("model.merges", (5, "x", [5], ["a"])),
             ("added_tokens", (5, "x", [5], [{}], [{"id": -1}])),
             ("pre_tokenizer", (5, "x", {"type": "x"}, {})),
             ("decoder", (5, "x", {"type": "x"}, {}))),
    *without("model"),
)  # fmt: skip
TABLES = (
    *TEXT, *changed(("domain_experts", EXPERT_TABLE), ("model", ("another", "0" * 32)),
                    ("state", ("another", "0" * 12)),
                    ("layer_indices", ([0, 1], [5, 4, 3, 2, 1, 0], *NO_LISTS))),
    *without("domain_experts"),
)  # fmt: skip
REPORT = (
    *TABLES,
    *changed(("composite_score", (*NO_OBJECTS, {}, [[]], [[1.0] * 16], None)),
             ("composite_score.0.0", (1.5, -7, 1e308, float("nan"), "x", [], 10**400)),
             ("general_experts", EXPERT_TABLE)),
    *without("composite_score"),
)  # fmt: skip
LIST = (
    *TEXT,
    *changed(("keep_map", (*EXPERT_TABLE, {})), ("keep_map.0", ([99], [-1], [1.5], [True], ["x"], 5)),
             ("original_num_experts", (15, "16", 16.5, 2**63, [])),
             ("layer_indices", ([0, 1], [5, 4, 3, 2, 1, 0], "x", 5, {}))),
    *without("keep_map"),
)  # fmt: skip
TABLE = (
    damage.with_nul, damage.no_text, *texts(b"", "a,b\n1,2\n", "layer,expert,action\n", b"\0" * 99),
    *with_line("x,1,keep,0,m", "0,x,keep,0,m", "0,99,keep,0,m", "99,0,keep,0,m", "0,1,maybe,0,m",
               "0,-1,keep,0,m", f"0,1,{LONG},0,m", f'0,1,"{"y" * 200_000}",0,m', "0,1",
               "9" * 5000 + ",1,keep,0,m"),
)  # fmt: skip
RULES = (
    *TEXT,
    *changed(("activate", EXPERT_TABLE), ("deactivate", EXPERT_TABLE),
             ("rule", (*NO_TEXTS, "no such rule", "", ESCAPE)),
             ("boost_value", (*NO_NUMBERS, float("nan"), 10**400)),
             ("mask_value", (*NO_NUMBERS, float("nan"), float("inf")))),
    lambda data, rng: json.dumps(json.loads(data) | {rng.choice(("", LONG, "activat")): 1}).encode(),
)  # fmt: skip
SETTINGS = (
    damage.with_nul, damage.no_text, *texts(ESCAPE, b"[" * 20000, b"a = " + b"[" * 20000, b"= 1"),
    *texts(b"refresh_rate = " + DIGITS, b"refresh_rate = 0x" + b"f" * 9000, "refresh_rate = 1e999",
           f"theme = '{LONG}", f"{LONG} = 1", "undo_budget = -1", "undo_budget = '9999999999999 EiB'",
           b"undo_budget = " + DIGITS, "keep_sessions = 'yes'", "[defaults]\nmetric = 'x'",
           b"[defaults]\nmax-tokens = " + DIGITS, "[defaults]\nseed = -1", "[defaults]\nseed = 1.5",
           "[defaults]\nno-such = 1"),
    *with_line("unknown = 1", "theme = 5", "refresh_rate = 'x'", "refresh_rate = inf", "x", "[",
               "theme = 'a'\ntheme = 'b'", "keep_sessions = 7", "undo_budget = []", "defaults = 5",
               "refresh_rate = 1979-05-27", "'''", '"\\q" = 1', "keys = 3", "[keys]\nno-such-key = 'x'"),
)  # fmt: skip
RAISING = (
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% if %}", "{{ messages[9].content }}", "{{ a.b.c }}",
    "{% for m in 3 %}{% endfor %}", "{{ 'x' * 10 ** 10 }}", "{{ range(10 ** 9) | list }}", "{{ '{:>{w}}'"
    ".format('x', w=10 ** 10) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{" + "(" * 5000,
    "{{ raise_exception('\x1b]52;c;ZXZpbA==\x07\u202e') }}", "{{ 'a'.join(3) }}",
    "{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}", "{{ '%1000000000d' % 1 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
    "{{ messages | map(attribute='x.y.z') | join(5) }}", "{{ 9 ** (9 ** 9) }}", "{{ ('x' * 2 ** 20) * 2 ** 20 }}",
    "{{ [0] * 10 ** 10 }}", "{{ 'x' | center(10 ** 10) }}", "{{ 'x\n' | indent(10 ** 10) }}", "{{ self.x }}",
)  # fmt: skip


def gz(damaged: Damage) -> Damage:
    return lambda data, rng: gzip.compress(damaged(gzip.decompress(data), rng))


DATA_LINES = with_line(
    "{", "[1", "5", '"text"', "{}", '{"x": 1}', '{"text": 5}', '{"text": ["x"]}', "[" * 9000,
    '{"messages": 5}', '{"messages": [5]}', '{"messages": [{"role": 5, "content": "x"}]}', "x" * 99_999,
    '{"messages": [{"role": "user"}]}', b'{"text": "\xff"}', '{"text": "a"', '{"text": ' + "9" * 9000 + "}",
    '{"prompt": 5, "completion": "x"}', '{"conversations": [{"from": 1}]}', "\0", '{"text": "a\0b"}',
)  # fmt: skip
_ON_MODEL = ("load ./model",)
_COLLECT = "collect --dataset {} --max-samples 9 --max-tokens 8"
_WITH = ("load ./model", "stats load good.npz")


def _model(file: str, damages: tuple[Damage, ...], share: int = 100, line: str = "info") -> Kind:
    return Kind(f"model/{file}", (*_ON_MODEL, line), damages, share)


KINDS: dict[str, Kind] = {
    "replay": Kind("bad.mlxfun", (), (*with_line(*LINES), *texts(b"", "#!mlxfun-session 99\ninfo\n")),
                   arguments=("--headless", "--output-root", "out", "--replay", "bad.mlxfun")),
    "replay in a session": Kind("bad.mlxfun", ("replay bad.mlxfun",), with_line(*LINES), 40),
    "kept session": Kind("bad.mlxfun", ("resume bad.mlxfun",), with_line(*LINES), 60),
    "recipe": Kind("bad.recipe", (*_ON_MODEL, "recipe bad.recipe --output made"),
                   (*with_line(*LINES[:4], "at most 2 KB", "try prune {1,2", "try prune {1,}", "at most x",
                               "try no-such", "judge --no 1", "try prune --n-prune {" + "1," * 5000 + "1}",
                               *[b"\xff", "[" * 5000, "try prune then"]),
                    *texts(b"", "at most 1 KB\n", "try prune --n-prune 1\n")), 60),
    "lines of data": Kind("bad.jsonl", (*_ON_MODEL, _COLLECT.format("bad.jsonl")), DATA_LINES, 80),
    "list of data": Kind("bad.json", (*_ON_MODEL, _COLLECT.format("bad.json")), TEXT, 30),
    "packed data": Kind("bad.jsonl.gz", (*_ON_MODEL, _COLLECT.format("bad.jsonl.gz")),
                        (damage.cut, *map(gz, DATA_LINES), *texts(b"\x1f\x8b\x08", b"x" * 999)), 40),
    "text": Kind("bad.txt", (*_ON_MODEL, _COLLECT.format("bad.txt")),
                 (damage.no_text, *texts(b"", b"\n" * 999, b"\xff\xfe\0", b" \t \n")), 20),
    "statistics": Kind("bad.npz", ("stats diff good.npz bad.npz",), damage_binary.STATISTICS),
    "statistics loaded": Kind("bad.npz", (*_ON_MODEL, "stats load bad.npz"), damage_binary.STATISTICS, 30),
    "expert list": Kind("bad.json", (*_WITH, "prune --expert-list bad.json"), LIST, 60),
    "expert table": Kind("bad.csv", (*_WITH, "prune --expert-list bad.csv"), TABLE, 40),
    "scan report": Kind("bad.json", (*_ON_MODEL, "steer --domain-map bad.json"), REPORT, 60),
    "scan report for a prune": Kind("bad.json", (*_WITH, "prune --n-prune 2 --domain-map bad.json"),
                                    TABLES, 30),
    "steering": Kind("bad.json", (*_ON_MODEL, "steer --config bad.json"), RULES, 60),
    "configuration": Kind("bad.toml", (), SETTINGS, arguments=("--plain", "--config", "bad.toml")),
    "config.json": _model("config.json", CONFIG),
    "weights": _model("model-00001-of-00001.safetensors", damage_binary.SAFETENSORS),
    "index": _model("model.safetensors.index.json", (
        *TEXT, *changed(("weight_map", (*NO_OBJECTS, {"a": 5}, {"a": "../../x"}, {"a": "gone.safetensors"}))),
        *without("weight_map")), 40),
    "tokenizer.json": _model("tokenizer.json", TOKENIZER, 60),
    "tokenizer_config.json": _model("tokenizer_config.json", (
        *TEXT, *changed(("tokenizer_class", (5, [], {})), ("eos_token", (5, [], [5])), ("chat_template", (5, 1.5)), ("model_max_length", ([], {}, "x")))), 40),
    "generation_config.json": _model("generation_config.json", (
        *TEXT, *changed(("eos_token_id", ("x", -1, 1.5, {}, [None], ["x"], [-1], 10**400, [[2]])))), 40),
    "chat template": _model("chat_template.jinja", texts(*RAISING), 40, "chat --max-tokens 1 hi"),
    "given template": Kind("bad.jinja", ("load ./model --chat-template bad.jinja", "chat --max-tokens 1 x"),
                           (damage.no_text, *texts(b"", b" \n", *RAISING)), 40),
}  # fmt: skip
TEMPLATES = ("chat template", "given template")


def good_files(warm: Warm, place: Path) -> dict[str, bytes]:
    """Make the place: a copy of the demo model and a good file of each kind, {path: content}."""
    shutil.copytree(demo.model_path(), place / "model")
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("kept")
    template = json.loads((place / "model/tokenizer_config.json").read_text())["chat_template"]
    (place / "model/chat_template.jinja").write_text(template)
    (place / "model/generation_config.json").write_text('{"eos_token_id": [2], "do_sample": true}')
    warm.lines(
        "load ./model", "collect --dataset demo:mixed --max-samples 6 --max-tokens 48",
        "stats save good.npz", "prune --n-prune 2", "plan save list.json", "plan save list.csv",
        "discard", "domain-scan --domain demo:python --general demo:mixed --domain-name p "
        "--max-samples 4 --max-tokens 32 --output report.json",
    )  # fmt: skip
    script = b"#!mlxfun-session 2\n#: seed 5\nset metric freq\ninfo\nprune --n-prune 2\ndiscard\n"
    data = b'{"text": "a few words of text"}\n' * 3
    made: dict[str, Callable[[], bytes]] = {
        "replay": lambda: script, "replay in a session": lambda: script, "kept session": lambda: script,
        "recipe": lambda: b"collect --dataset demo:mixed --max-samples 2 --max-tokens 8\nat most 9 MB\njudge --dataset demo:eval --max-samples 1\ntry prune --n-prune 1\n",
        "lines of data": lambda: data, "packed data": lambda: gzip.compress(data, mtime=0),
        "list of data": lambda: b'[{"text": "a few words"}, {"text": "and more"}]',
        "text": "a few words\n\nof text, \u00e4 too\n".encode,
        "statistics": (place / "good.npz").read_bytes, "statistics loaded": (place / "good.npz").read_bytes,
        "expert list": (place / "list.json").read_bytes, "expert table": (place / "list.csv").read_bytes,
        "scan report": (place / "report.json").read_bytes,
        "scan report for a prune": (place / "report.json").read_bytes,
        "steering": lambda: b'{"activate": {"1": [3]}, "deactivate": {"2": [5]}, "rule": "additive", '
                            b'"boost_value": 3.0, "mask_value": -5.0}',
        "configuration": lambda: b'theme = "mlxfun-light"\nrefresh_rate = 10\nkeep_sessions = false\n',
        "given template": template.encode,
    }  # fmt: skip
    found = {name: make() for name, make in made.items()}
    for name, kind in KINDS.items():
        if name not in found:
            found[name] = (place / kind.file).read_bytes()
    return found
