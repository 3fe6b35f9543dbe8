"""One dynamo graph -> one callable: what ``torch.compile(backend="dart")`` calls."""

from typing import Any

from dartfx.backend import graph_compiler


def __getattr__(name: str) -> Any:
    """``dart``, which torch looks up by the entry point before it traces the first frame."""
    if name != "dart":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    graph_compiler.prepare_dynamo()
    return graph_compiler.dart
