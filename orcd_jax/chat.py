"""Chat templates: messages into the prompt that a model was trained on, by the Jinja template its GGUF file carries.

Templates come from strangers, messages from users, and neither is trusted:

- A template runs in Jinja's immutable sandbox, which keeps it from Python but not from running or growing for ever.
  Here, a trace function in the rendering thread stops it at a deadline, and everything that can build a large value
  (operators, literals, slices, filters, methods) is weighed against a budget before or as it is built. Filters and
  methods that no chat template needs and that could do much work in one call are left out.
- Only control tokens that the template wrote become control tokens. Every template is rendered twice, the second time
  with the characters that control tokens are made of replaced, in the messages' contents, by stand-ins: what is found
  in that text is the template's own. The stand-ins are lone surrogates, which no valid text contains; they go through
  whatever the template does to contents (trimming, slicing, joining, macros) one for one.

The environment is that of HF transformers (https://huggingface.co/docs/transformers/chat_templating_writing).
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial, wraps
from types import BuiltinMethodType, CodeType, FrameType
from typing import Any, TypeVar

from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from orcd_jax.errors import GGUFError, RequestError, TemplateError
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.tokenizer import Tokenizer

TIME_LIMIT_S = 2.0
OUTPUT_LIMIT = 1 << 20  # characters, beside those of the messages
SOURCE_LIMIT = 1 << 16  # characters; the longest template of a supported model has 10,000

_KEY = "tokenizer.chat_template"
_FILENAME = "<chat template>"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_SURROGATES = range(0xD800, 0xE000)

Messages = Sequence[Mapping[str, str]]
_T = TypeVar("_T")


class ChatTemplate:
    """A chat template; threads may share it.

    It is compiled when it is first used, so that a bad one does not stop those who do without.
    """

    def __init__(self, source: str):
        """Keep the Jinja template `source`."""
        self._source = source
        self._code: CodeType | None = None

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ChatTemplate | None:
        """The chat template of a GGUF file: its default one, or else the first of its named ones, or None.

        Raises:
          GGUFError: the template is no text.
        """
        named = sorted(key for key in file.metadata if key.startswith(f"{_KEY}."))
        key = next((key for key in (_KEY, f"{_KEY}.default", *named) if key in file.metadata), None)
        if key is None:
            return None
        if not isinstance(file.metadata[key], str):
            raise GGUFError(f"{file.path}: {key} is no text; expected a Jinja template")
        return cls(file.metadata[key])

    def render(self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The prompt as text, for people to read; arguments and errors as in `encode`, which makes the ids."""
        render = self._renderer(tokenizer, add_generation_prompt)
        return render(_place_system(_check_messages(messages), render))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        max_characters: int | None = None,
    ) -> list[int]:
        """The prompt as token ids, with begin of text once if the file asks for it.

        A system message that the template drops is put before the first user message, with a warning.

        Args:
          tokenizer: of the same file.
          messages: each with the texts `role` ("system", "user", "assistant", …) and `content`.
          add_generation_prompt: end with the opening of the assistant's turn.
          max_characters: refuse messages with more.

        Raises:
          RequestError: the messages are not as above, or too long; says which.
          TemplateError: the template is malformed, refuses the messages, fails, or goes over its limits.
        """
        render = self._renderer(tokenizer, add_generation_prompt)
        checked = _check_messages(messages)
        characters = sum(len(message["content"]) for message in checked)
        if max_characters is not None and characters > max_characters:
            raise RequestError(
                f"the messages have {characters:,} characters; the context holds at most {max_characters:,}"
            )
        plain = _place_system(checked, render)
        stand_ins = _stand_ins(tokenizer.control_texts)
        veiled = [message | {"content": message["content"].translate(stand_ins)} for message in plain]
        plain_text, veiled_text = render(plain), render(veiled)

        spans = tokenizer.find_controls(veiled_text)
        text = veiled_text.translate({mark: character for character, mark in stand_ins.items()})
        if text != plain_text:
            # The template looks into contents, and did otherwise with veiled ones. The plain text will do if it has the
            # same control tokens, hence none out of contents; if not, the veiled rendering is the safe one.
            plain_spans = tokenizer.find_controls(plain_text)
            if [plain_text[slice(*span)] for span in plain_spans] == [text[slice(*span)] for span in spans]:
                text, spans = plain_text, plain_spans

        ids = tokenizer.encode_spans(text, spans)
        bos = tokenizer.bos_id
        return [bos, *ids] if tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _renderer(self, tokenizer: Tokenizer, add_generation_prompt: bool) -> Callable[[list[dict[str, str]]], str]:
        """A function that renders messages; its calls share one moment and one time limit."""
        now, end = datetime.now(), time.monotonic() + TIME_LIMIT_S
        bos, eos = ("" if i is None else tokenizer.token_text(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        code = self._compiled(end)

        def render(messages: list[dict[str, str]]) -> str:
            sandbox = _Sandbox(OUTPUT_LIMIT + sum(len(message["content"]) for message in messages), now)
            variables = {
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos,
                "eos_token": eos,
                "tools": None,
            }
            return _limited(end, lambda: sandbox.run(code, variables))

        return render

    def _compiled(self, end: float) -> CodeType:
        if self._code is None:
            if len(self._source) > SOURCE_LIMIT:
                raise TemplateError(
                    f"the chat template has {len(self._source)} characters; the limit is {SOURCE_LIMIT}"
                )
            self._code = _limited(end, lambda: _Sandbox(OUTPUT_LIMIT, datetime.now()).guarded(self._source))
        return self._code


def _place_system(
    messages: list[dict[str, str]], render: Callable[[list[dict[str, str]]], str]
) -> list[dict[str, str]]:
    """The messages, with system messages that the template drops at the start of the first user message."""
    probes = {i: secrets.token_hex(16) for i, m in enumerate(messages) if m["role"] == "system" and m["content"]}
    if not probes:
        return messages
    rendered = render([m | {"content": probes.get(i, m["content"])} for i, m in enumerate(messages)]).lower()
    dropped = [i for i, probe in probes.items() if probe not in rendered]
    if not dropped:
        return messages
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first_user is None:
        raise TemplateError("the chat template drops system messages, and there is no user message to put them in")
    warnings.warn("the chat template drops system messages; they go before the first user message", stacklevel=3)
    content = "\n\n".join(messages[i]["content"] for i in (*dropped, first_user))
    placed = [*messages[:first_user], {"role": "user", "content": content}, *messages[first_user + 1 :]]
    return [message for i, message in enumerate(placed) if i not in dropped]


@lru_cache(maxsize=8)
def _stand_ins(control_texts: frozenset[str]) -> dict[int, int]:
    """A lone surrogate for each character of control tokens; not for white space, which templates trim."""
    characters = sorted({character for text in control_texts for character in text if not character.isspace()})
    if len(characters) > len(_SURROGATES):
        raise TemplateError(f"the vocabulary's control tokens have {len(characters)} different characters; use --raw")
    return dict(zip(map(ord, characters), _SURROGATES, strict=False))


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("the messages are no list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise RequestError(f"message {number} has {found}; expected the keys 'role' and 'content', no others")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise RequestError(f"message {number} has the role {role!r:.80}; expected a word such as 'user'")
        if not isinstance(content, str):
            raise RequestError(f"message {number} has a content of type {type(content).__name__}; expected a text")
        if not content.isascii() and any(ord(c) in _SURROGATES for c in set(content)):
            raise RequestError(f"message {number} has a lone surrogate; decode it from its bytes with errors='replace'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


class _OverLimit(BaseException):
    """The template went over a limit. Not an Exception, so that nothing on the way out takes it for one of its own."""


class _Refusal(Exception):
    """The template called `raise_exception`."""


def _limited(end: float, function: Callable[[], _T]) -> _T:
    """`function()`, stopped at the time `end`; all that can happen to a template becomes a `TemplateError`.

    The time is looked at whenever Python code is called in this thread, and at each line of the template.
    """

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise _OverLimit(f"takes longer than {TIME_LIMIT_S:g} s")
        return trace if frame.f_code.co_filename == _FILENAME else None

    previous = sys.gettrace()
    try:
        try:
            sys.settrace(trace)
            return function()
        finally:
            sys.settrace(previous)
    except _OverLimit as e:
        raise TemplateError(f"the chat template {e}; use --raw to prompt without it") from None
    except _Refusal as e:
        raise TemplateError(f"the chat template refuses these messages: {_one_line(e)}") from None
    except Exception as e:
        reason = _one_line(e) or type(e).__name__
        raise TemplateError(f"the chat template fails: {reason}; use --raw to prompt without it") from None


def _one_line(e: Exception) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(e).split()))[:200]


_WEIGH, _CONCAT = "(weigh)", "(concat)"  # filters under names that a template cannot write


class _Guard(NodeTransformer):
    """Sends what builds values without a call (literals, slices, `~`) through filters, where `_Sandbox` sees it."""

    def _weigh(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, _WEIGH, [], [], None, None, lineno=node.lineno)

    visit_List = visit_Dict = _weigh

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weigh(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._weigh(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        operands = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(operands, _CONCAT, [], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """Jinja's namespace, whose contents do not count when it is printed: nested ones could be endless."""

    def __repr__(self) -> str:
        return "<namespace>"


# What a template can put values into (a namespace aside), and what an entry costs, in characters.
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
_ITEM_COST = 16
_MAX_BITS = 1024
_MAX_ARGUMENT = 64  # characters to strip, or of an indentation or separator
# What chat templates use. All take time and memory in proportion to their arguments, which are weighed.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "string",
    "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_STRING_METHODS = (
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)  # fmt: skip
_METHODS: dict[type, tuple[str, ...]] = {
    str: _STRING_METHODS,
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment: Jinja's immutable sandbox with a budget.

    A text may not grow beyond `limit` characters, a container not beyond four times that when written out, and all that
    a rendering builds not beyond 16 times that. Sizes are known before the memory is taken, or at most one such value
    late.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, limit: int, now: datetime):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.limit = limit
        self.budget = 16 * limit
        self.filters = {name: self._refused_filter(name) for name in FILTERS}
        self.filters |= {name: self._weighed(FILTERS[name]) for name in _FILTERS}
        self.filters |= {
            _WEIGH: self.weigh,
            _CONCAT: self.concat,
            "join": _join,
            "replace": self._replace,
            "safe": str,
            "tojson": self._weighed(_to_json),
            "trim": self._trim,
        }
        self.globals = {
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": partial(_strftime, now),
        }

    def guarded(self, source: str) -> CodeType:
        """A template's source as code for `run`, of this sandbox or another."""
        tree = _Guard().visit(self.parse(source))
        tree.set_environment(self)
        return self.compile(tree, filename=_FILENAME)

    def run(self, code: CodeType, variables: dict[str, Any]) -> str:
        """The template's output."""
        template = self.template_class.from_code(self, code, self.globals)
        return self.concat(template.root_render_func(template.new_context(variables)))

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise _OverLimit(f"builds more than {16 * self.limit} characters in all")

    def check_length(self, length: int) -> None:
        if length > self.limit:
            raise _OverLimit(f"makes a text of {length} characters; expected at most {self.limit}")

    def check_expansion(self, value: Any) -> None:
        """Refuses a container that would be huge when printed or compared, such as one that holds itself many times."""
        left, stack = 4 * self.limit, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                left -= len(item)
            elif isinstance(item, _CONTAINERS):
                left -= _ITEM_COST * len(item)
                if left >= 0:
                    stack += [*item, *item.values()] if isinstance(item, dict) else item
            if left < 0:
                raise _OverLimit(f"makes a list or mapping of more than {4 * self.limit} characters")

    def weigh(self, value: Any) -> Any:
        """`value`, once it is known to be within the limits."""
        if isinstance(value, str):
            self.check_length(len(value))
            self.spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self.spend(_ITEM_COST * len(value))
            self.check_expansion(value)
        return value

    def concat(self, pieces: Iterable[Any]) -> str:
        """What Jinja, too, joins the output with."""
        texts: list[str] = []
        length = 0
        for piece in pieces:
            texts.append(str(piece))
            length += len(texts[-1])
            self.check_length(length)
        self.spend(length)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for a, b in ((left, right), (right, left)):
            if isinstance(a, int) and a.bit_length() > _MAX_BITS:
                raise _OverLimit(f"computes with a number of more than {_MAX_BITS} bits")
            if operator == "*" and isinstance(a, (str, list, tuple)) and isinstance(b, int):
                (self.check_length if isinstance(a, str) else self.spend)(len(a) * b)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not supported")
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and integers and left.bit_length() * right > _MAX_BITS:
            raise _OverLimit(f"computes a number of more than {_MAX_BITS} bits")
        return self.weigh(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Through `dict.update` a template could change what it was given.
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        return None  # not for a safe `format`: `call` knows none

    def is_safe_callable(self, obj: Any) -> bool:
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, BuiltinMethodType) or isinstance(owner, Markup):
            return obj.__name__ in _METHODS.get(type(owner), ())
        return super().is_safe_callable(obj)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"calling {getattr(__obj, '__name__', type(__obj).__name__)!r:.80} is not supported")
        __self.check_expansion([args, kwargs])
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            if __obj.__name__ == "join":
                __obj = partial(_join, __self, d=owner)
            elif __obj.__name__ == "replace":
                __obj = partial(__self._replace, owner)
            elif __obj.__name__.endswith("strip"):
                _check_argument(*args)
        return __self.weigh(super().call(__context, __obj, *args, **kwargs))

    def _weighed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # takes along Jinja's mark of functions that want the environment or context
        def weighed(*args: Any, **kwargs: Any) -> Any:
            return self.weigh(function(*args, **kwargs))

        return weighed

    def _refused_filter(self, name: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise SecurityError(f"the filter {name!r} is not supported")

        return refused

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new, count = str(text), str(old), str(new), -1 if count is None else count
        found = text.count(old) if count < 0 else min(count, text.count(old))
        self.check_length(len(text) + found * max(0, len(new) - len(old)))
        return self.weigh(text.replace(old, new, count))

    def _trim(self, text: Any, chars: str | None = None) -> str:
        _check_argument(chars)
        return self.weigh(str(text).strip(chars))


def _check_argument(*args: Any) -> None:
    """Refuses long arguments where the time would be their length times another's."""
    if any(isinstance(arg, str) and len(arg) > _MAX_ARGUMENT for arg in args):
        raise _OverLimit(f"passes an argument of more than {_MAX_ARGUMENT} characters")


@pass_environment
def _join(sandbox: _Sandbox, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    def pieces() -> Iterator[Any]:
        for number, item in enumerate(value):
            if number:
                yield d
            yield item if attribute is None else make_attrgetter(sandbox, attribute)(item)

    return sandbox.concat(pieces())


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, as HF's: no escapes for HTML, keys in their order."""
    if isinstance(indent, int) and indent > _MAX_ARGUMENT:
        raise _OverLimit(f"indents by {indent}; expected at most {_MAX_ARGUMENT}")
    _check_argument(indent, *(separators or ()))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime(now: datetime, format: str) -> str:
    _check_argument(format)
    return now.strftime(format)


def _raise_exception(message: Any) -> None:
    raise _Refusal(message)
