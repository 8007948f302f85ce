"""Loads a tokenizer as stock mlx-lm does, with its chat template from wherever the model keeps it.

A template is in tokenizer_config.json, chat_template.jinja or additional_chat_templates, which
transformers reads; in chat_template.json or processor_config.json, which it reads for processors
only; or in a file that the user names, which comes before all of these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_tokenizer

from mlxfun.errors import ModelError
from mlxfun.files import read_text
from mlxfun.text import shown

SIDECARS = ("chat_template.json", "processor_config.json")
LARGEST_TEMPLATE = 4 << 20
NONE = (
    "the model has no chat template: the turns of a conversation are joined by newlines, which is "
    "not what it was trained on; give one with load --chat-template FILE"
)


def open_tokenizer(
    path: Path, chat_template: Path | None = None
) -> tuple[TokenizerWrapper, str, tuple[str, ...]]:
    """(tokenizer, where its chat template is from ("" for none), notes) of a model directory.

    chat_template: a file to use instead of the model's own. Raises ModelError.
    """
    given = None if chat_template is None else template_in(chat_template)
    _require_sound(path)
    try:
        eos = load_config(path).get("eos_token_id")
        tokenizer = _load(path, given, eos)
        origin = _origin(tokenizer, path)
        if given is not None:
            origin = str(chat_template)
        elif not tokenizer.has_chat_template:
            given, origin = _sidecar(path)
            if given is not None:
                tokenizer = _load(path, given, eos)
    except StrictDataclassError as error:
        raise ModelError(f"{path / 'config.json'} is not valid: {_field(error)}") from error
    except Exception as error:
        # Whatever the files make stock code raise: tokenizers, which is Rust, raises Exception
        # itself, so no list of kinds is complete.
        text = " ".join(str(error).split())
        text = text if len(text) <= 200 else f"{text[:200]}..."
        raise ModelError(
            f"the tokenizer of {path} does not load: {type(error).__name__}: {text}; {_advice(path)}"
        ) from error
    _be_quiet(tokenizer)
    return tokenizer, origin, _named(tokenizer) if origin else (NONE,)


# Values that stock loading takes without a word and leaves out, such as an end of the answer that
# is never seen then.
_TEXT = (str, dict, type(None))
_SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), _TEXT),
    "chat_template": (str, dict, list, type(None)),
    "model_max_length": (int, float, type(None)),
    "tokenizer_class": (str, type(None)),
}


def _require_sound(path: Path) -> None:
    """Raise ModelError for settings of the tokenizer or of generation that cannot be."""
    for name, value in _object(path / "tokenizer_config.json").items():
        if name in _SETTINGS and not isinstance(value, _SETTINGS[name]):
            raise _wrong(path / "tokenizer_config.json", name, value)
    file = path / "generation_config.json"
    value = _object(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and 0 <= one < 1 << 31 for one in ids):
        raise _wrong(file, "eos_token_id", value)


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the model, empty where there is none. Raises ModelError."""
    try:
        document = json.loads(read_text(file, "utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # stock loading passes over some of these
        raise ModelError(f"{file} is not valid JSON; {_RESTORE}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{file} is not a JSON object; {_RESTORE}")
    return document


_RESTORE = "restore it from the model's source, or remove it if the model came without it"


def _wrong(file: Path, name: str, value: Any) -> ModelError:
    return ModelError(f"{file}: {name} is {shown(value)}, which cannot be; {_RESTORE}")


def _field(error: StrictDataclassError) -> str:
    """What transformers says of a field, in one line: the field, what it wants and what it holds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    kind, colon, rest = text.partition(": ")
    text = rest if colon and kind.endswith("Error") else text
    text = text.replace("`", "'")
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return f"{text}; restore the value from the model's source"


def _advice(path: Path) -> str:
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return "tokenizer.json is missing, fetch it from the model's source"
    return "fetch the tokenizer's files from the model's source again"


def _load(path: Path, template: Any, eos: Any) -> TokenizerWrapper:
    extra = {} if template is None else {"chat_template": template, "chat_template_type": None}
    tokenizer: TokenizerWrapper = load_tokenizer(path, extra, eos_token_ids=eos)
    named = tokenizer.chat_template
    if isinstance(named, dict) and len(named) == 1 and "default" not in named:
        # transformers refuses to guess; of one there is nothing to guess.
        tokenizer.chat_template = next(iter(named.values()))
    return tokenizer


def template_in(file: Path) -> str | dict[str, str]:
    """The template, or the named ones, of a .jinja or .json file. Raises ModelError."""
    try:
        if not file.is_file():
            raise ModelError(f"no such chat template: {file}; name a .jinja or .json file")
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise ModelError(f"{file} is {file.stat().st_size:,} bytes, which is no chat template")
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the chat template {file}: {error}") from error
    if file.suffix.lower() != ".json":
        if not text.strip():
            raise ModelError(f"{file} is empty; name a file that holds a chat template")
        return text
    found = _in_json(text)
    if found is None:
        raise ModelError(f"{file} holds no chat template under the key chat_template")
    return found


def _in_json(text: str) -> str | dict[str, str] | None:
    """The value of chat_template in a JSON text: a template, or named ones as object or list."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = document.get("chat_template") if isinstance(document, dict) else document
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    if isinstance(found, str) and found.strip():
        return found
    if (
        isinstance(found, dict)
        and found
        and all(isinstance(x, str) for x in [*found, *found.values()])
    ):
        return found
    return None


def _sidecar(path: Path) -> tuple[Any, str]:
    """(template, file name) of a file that stock loading does not read, (None, "") without one."""
    for name in SIDECARS:
        file = path / name
        try:
            found = _in_json(file.read_text("utf-8-sig")) if file.is_file() else None
        except (OSError, ValueError):
            found = None
        if found is not None:
            return found, name
    return None, ""


def _origin(tokenizer: TokenizerWrapper, path: Path) -> str:
    """Where the template that stock loading found is from, "" where it found none."""
    if not tokenizer.has_chat_template:
        return ""
    if tokenizer.chat_template is None:
        return "code of mlx-lm or of the tokenizer"
    for name in ("chat_template.jinja", "additional_chat_templates"):
        if (path / name).exists():
            return name
    return "tokenizer_config.json"


def _named(tokenizer: TokenizerWrapper) -> tuple[str, ...]:
    """A note on named templates: which there are, and what becomes of them."""
    found = tokenizer.chat_template
    if not isinstance(found, dict):
        return ()
    names = ", ".join(map(str, found))
    if "default" not in found:
        return (
            f"the model has chat templates named {names} and none named default; give the one to "
            "use with load --chat-template FILE",
        )
    return (
        f"chat templates named {names}: default is used, tool_use for conversations with tools",
    )


def _be_quiet(tokenizer: TokenizerWrapper) -> None:
    # Long texts are cut to --max-tokens after tokenizing; transformers would print a warning
    # about them into whatever screen is up.
    warned = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(warned, dict):
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True
