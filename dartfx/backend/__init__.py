"""One dynamo graph -> one callable: what ``torch.compile(backend="dart")`` calls."""

from dartfx.backend.graph_compiler import compile_graph, dart

__all__ = ["compile_graph", "dart"]
