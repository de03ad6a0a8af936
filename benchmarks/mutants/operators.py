"""Mutants of one module: small changes of its syntax tree, each of which some test should notice.

Left out by rule: annotations, decorators, docstrings, f-strings, assertions, arguments of logging calls and of raised
errors, and keyword arguments named in TEXT and SWITCHES. `replace(state, field=...)` loses one field
at a time, because such a call is the assignment of an immutable state.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TEXT = frozenset({"reason", "message", "remedy", "why", "doc"})
"""Names of keyword arguments and variables that hold text for people."""

SWITCHES = frozenset({"strict", "init"})
"""Names of keyword arguments that assert (`strict` of zip) or shape a generated method (`init` of a field)."""
LOGGING = frozenset({"debug", "info", "warning", "error", "exception", "log", "warn"})
TYPES = frozenset({"Literal", "Annotated", "TypeVar", "NewType", "Meta"})
WORD = re.compile(r"[a-z][a-z0-9_+-]*")
"""Strings that are values, such as the name of a phase. Everything else is text."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "any": "all", "amin": "amax", "minimum": "maximum", "clamp_min": "clamp_max"}
NAMES |= {new: old for old, new in NAMES.items()}


@dataclass(frozen=True)
class Mutant:
    """One change. `apply` makes it in the tree that the mutant came from."""

    name: str
    """The scope, the old code and the new code; stable while other code of the module changes."""
    scope: tuple[str, int] | None
    """Qualified name and first line of the outermost function; None for code that runs at import."""
    lines: range
    """Lines of the statement, or of the head of a compound statement."""
    apply: Callable[[], None]


def mutants(tree: ast.Module) -> list[Mutant]:
    """List every mutant of a module, in the order of the source."""
    found = list(_Finder().find(tree))
    seen: Counter[str] = Counter()
    named = []
    for mutant in found:
        seen[mutant.name] += 1
        number = seen[mutant.name]
        named.append(
            mutant if number == 1 else Mutant(f"{mutant.name} [{number}]", mutant.scope, mutant.lines, mutant.apply)
        )
    return named


Change = tuple[str, str, Callable[[], None]]
"""Old code, new code, and the change."""


class _Finder:
    """Walks a tree and keeps the scope and the lines of the statement that it is in."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self._scope: tuple[str, int] | None = None
        self._lines = range(0)
        self._around: ast.AST | None = None
        """The expression around the one that is visited."""

    def find(self, tree: ast.Module) -> Iterator[Mutant]:
        yield from self._block(tree.body)

    def _block(self, body: list[ast.stmt]) -> Iterator[Mutant]:
        for index, statement in enumerate(body):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            yield from self._statement(body, index, statement)

    def _statement(self, body: list[ast.stmt], index: int, node: ast.stmt) -> Iterator[Mutant]:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from self._function(node)
                return
            case ast.ClassDef():
                outer_path = list(self._path)
                self._path.append(node.name)
                yield from self._block(node.body)
                self._path = outer_path
                return
            case ast.Import() | ast.ImportFrom() | ast.Assert():
                return
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return
        blocks: list[list[ast.stmt]] = [
            part for name in ("body", "orelse", "finalbody") if isinstance(part := getattr(node, name, None), list)
        ]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        blocks += [case.body for case in getattr(node, "cases", [])]
        inner = [block[0].lineno for block in blocks if block]
        self._lines = range(node.lineno, (min(inner) if inner else (node.end_lineno or node.lineno) + 1))
        if not self._lines:
            self._lines = range(node.lineno, node.lineno + 1)
        self._around = node if isinstance(node, ast.Return | ast.Assign | ast.AnnAssign | ast.AugAssign) else None
        for change in self._removals(body, index, node):
            yield self._mutant(*change)
        for change in self._expressions(node):
            yield self._mutant(*change)
        for block in blocks:
            yield from self._block(block)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Mutant]:
        outer_path, outer_scope, outer_lines = list(self._path), self._scope, self._lines
        self._lines = range(node.lineno, node.body[0].lineno)
        self._around = None
        self._path.append(node.name)
        for defaults in (node.args.defaults, node.args.kw_defaults):
            for at, default in enumerate(defaults):
                if default is not None:
                    for change in self._replacements(default, defaults, at):
                        yield self._mutant(*change)
        if self._scope is None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            self._scope = (".".join(self._path), first)
        yield from self._block(node.body)
        self._path, self._scope, self._lines = outer_path, outer_scope, outer_lines

    def _mutant(self, old: str, new: str, apply: Callable[[], None]) -> Mutant:
        return Mutant(f"{'.'.join(self._path) or 'module'}: {old} -> {new}", self._scope, self._lines, apply)

    def _removals(self, body: list[ast.stmt], index: int, node: ast.stmt) -> Iterator[Change]:
        """Statements that the block is left without, and jumps that become others."""

        def put(new: ast.stmt) -> Callable[[], None]:
            return lambda: body.__setitem__(index, ast.copy_location(new, node))

        match node:
            case ast.Expr(value=ast.Call() as call):
                if not _is_logging(call):
                    yield _short(node), "removed", put(ast.Pass())
            case ast.Expr(value=ast.Yield() | ast.YieldFrom()):
                pass  # without its yield a generator is a plain function
            case (
                ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
                | ast.AnnAssign(target=ast.Attribute() | ast.Subscript(), value=ast.expr())
                | ast.AugAssign()
                | ast.Delete()
            ):
                yield _short(node), "removed", put(ast.Pass())
            case ast.Raise():
                yield _short(node), "removed", put(ast.Pass())
            case ast.Break():
                yield "break", "continue", put(ast.Continue())
            case ast.Continue():
                yield "continue", "break", put(ast.Break())
            case ast.Return(value=value) if value is not None and not _is_falsy(value):
                yield _short(node), "return None", put(ast.Return(value=ast.Constant(value=None)))

    def _expressions(self, node: ast.stmt) -> Iterator[Change]:
        """Changes of the expressions of one statement, without the statements inside it."""
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and _is_logging(node.value)):
            return
        if isinstance(node, ast.Assign) and _is_text(node.targets, node.value):
            return
        if isinstance(node, ast.AugAssign):
            new = ARITHMETIC.get(type(node.op))
            if new is not None:
                yield _short(node), f"{new.__name__}", _setter(node, "op", new())
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
            yield f"if {_short(node.test)}", "not", _setter(node, "test", _negated(node.test))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "targets", "target", "body", "orelse", "finalbody", "handlers", "op"):
                continue
            if name == "cases" and isinstance(node, ast.Match):
                for case in node.cases:
                    if case.guard is not None:
                        yield from self._replacements(case.guard, case, "guard")
                continue
            for at, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(child, ast.expr):
                    yield from self._replacements(
                        child, value if at is not None else node, at if at is not None else name
                    )
                elif isinstance(child, ast.withitem):
                    yield from self._replacements(child.context_expr, child, "context_expr")

    def _replacements(self, node: ast.expr, owner: object, at: str | int) -> Iterator[Change]:
        """Changes of `node`, which `owner` holds as the attribute or at the index `at`, and of all that it holds."""

        def put(new: ast.expr) -> Callable[[], None]:
            return _setter(owner, at, ast.fix_missing_locations(ast.copy_location(new, node)))

        match node:
            case ast.JoinedStr() | ast.Lambda(body=ast.JoinedStr()):
                return
            case ast.Subscript(value=ast.Name(id=name)) if name in TYPES:
                return
            case ast.Call(func=ast.Name(id=name)) if name in TYPES:
                return
            case ast.Constant(value=value):
                place = "" if self._around is None else f" in {_short(self._around)}"
                for new in _constants(value):
                    yield f"{value!r}{place}", repr(new), _setter(node, "value", new)
                return
            case ast.Compare():
                for index, op in enumerate(node.ops):
                    for swapped in COMPARISONS[type(op)]:
                        ops = [*node.ops[:index], swapped(), *node.ops[index + 1 :]]
                        changed = ast.Compare(left=node.left, ops=ops, comparators=node.comparators)
                        yield _short(node), _short(changed), _setter(node, "ops", ops)
            case ast.BoolOp():
                other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield _short(node), type(other).__name__.lower(), _setter(node, "op", other)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield _short(node), _short(node.operand), put(node.operand)
            case ast.BinOp() if not _is_string(node.left) and not _is_string(node.right):
                if type(node.op) in ARITHMETIC:
                    other_way = ARITHMETIC[type(node.op)]()
                    yield _short(node), type(other_way).__name__, _setter(node, "op", other_way)
            case ast.IfExp() if not isinstance(node.test, ast.Compare | ast.UnaryOp):
                yield f"if {_short(node.test)}", "not", _setter(node, "test", _negated(node.test))
            case ast.Call():
                match node.func:
                    case ast.Name(id=name) if name in NAMES:
                        yield _short(node), NAMES[name], _setter(node.func, "id", NAMES[name])
                    case ast.Attribute(attr=name) if name in NAMES:
                        yield _short(node), NAMES[name], _setter(node.func, "attr", NAMES[name])
                    case ast.Name(id="replace") | ast.Attribute(attr="replace"):
                        for keyword in node.keywords:
                            if keyword.arg is not None and keyword.arg not in TEXT:
                                rest = [other for other in node.keywords if other is not keyword]
                                yield f"replace({_short(keyword)})", "removed", _setter(node, "keywords", rest)
        outer = self._around
        self._around = node
        yield from self._inside(node)
        self._around = outer

    def _inside(self, node: ast.expr) -> Iterator[Change]:
        for name, value in ast.iter_fields(node):
            for at, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(child, ast.expr):
                    if isinstance(node, ast.Dict) and name == "keys" and isinstance(child, ast.Constant):
                        continue
                    yield from self._replacements(
                        child, value if at is not None else node, at if at is not None else name
                    )
                elif isinstance(child, ast.keyword):
                    if child.arg not in TEXT and child.arg not in SWITCHES:
                        yield from self._replacements(child.value, child, "value")
                elif isinstance(child, ast.comprehension):
                    yield from self._replacements(child.iter, child, "iter")
                    for index, condition in enumerate(child.ifs):
                        yield from self._replacements(condition, child.ifs, index)


def _setter(owner: Any, at: str | int, value: object) -> Callable[[], None]:
    """Return the assignment of `value` to an attribute or an index of `owner`."""
    if isinstance(at, int):
        return lambda: owner.__setitem__(at, value)
    return lambda: setattr(owner, at, value)


def _negated(node: ast.expr) -> ast.expr:
    return ast.fix_missing_locations(ast.copy_location(ast.UnaryOp(op=ast.Not(), operand=node), node))


def _constants(value: object) -> tuple[object, ...]:
    """Other values of a constant: the neighbours of a whole number, twice and half of a large or a real one."""
    match value:
        case bool():
            return (not value,)
        case int() if abs(value) <= 8:
            return (value + 1, value - 1)
        case int():
            return (value + 1, 2 * value)
        case float() if value in (0.0, 1.0):
            return (value + 1.0, value - 1.0)
        case float():
            return (2.0 * value, 0.5 * value)
        case str() if WORD.fullmatch(value):
            return ("mutant",)
    return ()


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else text[:60] + "..." + text[-27:]


def _is_falsy(node: ast.expr) -> bool:
    """Return True for None and False, which callers that test a truth value do not tell apart."""
    return isinstance(node, ast.Constant) and node.value in (None, False)


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_text(targets: list[ast.expr], value: ast.expr) -> bool:
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return bool(names & TEXT) and (_is_string(value) or isinstance(value, ast.IfExp))


def _is_logging(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
            return name in ("logger", "logging", "warnings", "log", "_log") and method in LOGGING
    return False
