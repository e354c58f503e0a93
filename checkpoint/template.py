"""Chat templates: programs that come with a checkpoint, and are therefore run within bounds.

jinja2's sandbox bounds what a template can reach: no file, no module, no internals. It does not bound what a template
can use up: `'a' * 10 ** 10` or three nested loops need a few characters. Here every operation that can make something
large, or go on for long, is paid for beforehand out of a budget of characters; a template that overspends is refused.
"""
import re
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 2_000_000
LONGEST = 100_000  # characters of a template's source: compiling it takes memory too


def render(source: str, **variables: Any) -> str:
    """The text of a template. Raises whatever the template raises, and TemplateError where it overspends."""
    if len(source) > LONGEST:
        raise TemplateError(f"it has {len(source)} characters, more than {LONGEST}")
    environment = _Metered(len(source))
    tree = _Marked().visit(environment.parse(source))
    return environment.from_string(tree).render(**variables)


class _Marked(NodeTransformer):
    """Leads what jinja2 does by itself (loops, `~`, slices) through filters, which are paid for."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("a recursive loop is not implemented")
        node.iter = _filter(node.iter, "each")
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        return self.generic_visit(_filter(nodes.List(node.nodes, lineno=node.lineno), "join"))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node = self.generic_visit(node)
        return _filter(node, "sliced") if isinstance(node.arg, nodes.Slice) else node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Metered(ImmutableSandboxedEnvironment):
    """The sandbox with a budget. `source_size`: the price of running through the template once more, in loops and macros."""
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, source_size: int):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], optimized=False, finalize=self.paid)
        self.source_size, self.spent = source_size, 0
        self.filters = {name: self.metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"each": self.each, "sliced": self.paid}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception

    def spend(self, price: int) -> None:
        self.spent += price
        if self.spent > BUDGET:
            raise TemplateError("it makes too much, or goes on for too long")

    def paid(self, value: Any) -> Any:
        """What is printed or cut out costs its size."""
        self.spend(_size(value))
        return value

    def each(self, items: Any) -> list:
        found = list(items)
        self.spend(len(found) * self.source_size)
        return found

    def pay(self, name: str, *given: Any) -> None:
        """The price of a call is its inputs' sizes multiplied (a number's size is its value), which bounds any result of one
        call: `center`, `replace`, `join`, `*` ... A format counts with the largest number in it, which may be a width."""
        price = 1
        for value in given:
            if isinstance(value, str) and (name == "%" or "format" in name):
                price *= max(1, *map(int, re.findall(r"\d+", value)), 1)
            price *= max(1, _size(value))
        self.spend(sum(map(_size, given)) if name in ("+", "default", "d", "function") else price)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.pay(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # these names leave the template's keywords free
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(__obj, Macro):
            __self.spend(__self.source_size)
        __self.pay("function" if owner is None else method.__name__, owner, *args, *kwargs.values())
        return __self.paid(super().call(__context, __obj, *args, **kwargs))

    def metered(self, name: str, function: Any) -> Any:
        @wraps(function)  # also what says which arguments jinja2 adds
        def call(*args: Any, **kwargs: Any) -> Any:
            first = hasattr(function, "jinja_pass_arg")  # then the first argument is jinja2's own
            self.pay(name, *args[first:], *kwargs.values())
            found = function(*args, **kwargs)
            return self.paid(list(found) if hasattr(found, "__next__") else found)  # a generator would do its work unseen
        return call


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _size(value: Any) -> int:
    """Characters, elements at any depth, or the value of a whole number; stops counting beyond the budget."""
    if isinstance(value, (str, bytes, range)):
        return len(value)
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    total = 1
    if isinstance(value, (list, tuple, set, dict)):
        for item in value.items() if isinstance(value, dict) else value:
            total += _size(item)
            if total > BUDGET:
                break
    return total
