"""The decoder split into two halves, with the cut between them.

Each half is compiled separately with its own number of tokens, as in vLLM's models with fewer
tokens in later layers.  The cut runs between them as plain Python.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dartfx.ops.registration  # noqa: F401  (registers torch.ops.dartfx.select_tokens)
from dartfx.config import DartConfig
from dartfx.errors import ConfigError
from dartfx.integrations.vllm import attention, cut, vllm_api
from dartfx.integrations.vllm.batch import Part, pieces, plan_step
from dartfx.integrations.vllm.runners.prompts import prompts_of

__all__ = ["PrunedDecoder"]

_TRIAL_ROWS = 8


@functools.cache
def _watched(attention_class: Any) -> Any:
    """Return a subclass of an attention layer that records the rotated keys of its last call."""

    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any
    ) -> Any:
        self.dartfx_key = key
        return attention_class.forward(self, query, key, value, *more, **named)

    return type(f"Watched{attention_class.__name__}", (attention_class,), {"forward": forward})


@functools.cache
def _halves() -> tuple[Any, Any]:
    """Create the classes of the two halves once, where vLLM is installed."""
    dynamic = {"positions": -1, "hidden": 0}

    @vllm_api.support_torch_compile(dynamic_arg_dims=dynamic)
    class Head(nn.Module):
        def __init__(
            self, *, vllm_config: Any, prefix: str = "", layers: Any, attention: Any
        ) -> None:
            super().__init__()
            self.layers = layers
            self.attention = attention

        def forward(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            residual = None
            for layer in self.layers:
                hidden, residual = layer(positions, hidden, residual)
            key, self.attention.dartfx_key = self.attention.dartfx_key, None
            return hidden, residual, key  # type: ignore[return-value]

    @vllm_api.support_torch_compile(dynamic_arg_dims=dynamic | {"residual": 0})
    class Tail(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "", layers: Any, norm: Any) -> None:
            super().__init__()
            self.layers = layers
            self.norm = norm

        def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor) -> Tensor:
            for layer in self.layers:
                hidden, residual = layer(positions, hidden, residual)
            normed: Tensor = self.norm(hidden, residual)[0]
            return normed

    return Head, Tail


@contextlib.contextmanager
def _without_attention(decoder: Any) -> Iterator[None]:
    """Make attention layers return their queries while there is no KV cache."""
    layers = [m for m in decoder.modules() if isinstance(m, vllm_api.Attention)]
    for layer in layers:
        layer.forward = lambda query, *_, **__: query
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def _adapters(tables: list[Any], gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Set the LoRA adapters of the rows that the layers inside the block process.

    gather: computes them from the adapters of the step's rows.
    """
    before = [vllm_api.put_adapters(table, gather(table.token_lora_indices)) for table in tables]
    yield
    for table, adapters in zip(tables, before, strict=True):
        if adapters is not None:
            vllm_api.put_adapters(table, adapters)


def _of_requests(first: Tensor, rows: Tensor, adapters: Tensor) -> Tensor:
    """Adapters for ``rows`` rows of each request, whose rows in the step start at ``first``."""
    return adapters[first].repeat_interleave(rows)


class PrunedDecoder:
    """Runs one decoder instance with a cut before layer ``config.layer``.

    vision: [T] bool on the host, the vision tokens of the next step.
    """

    def __init__(
        self,
        decoder: Any,
        attentions: list[Any],
        vllm_config: Any,
        config: DartConfig,
        own_blocks: bool,
    ) -> None:
        (layer,) = config.layers
        before, behind = attentions[:layer], attentions[layer:]
        for each in behind:
            each.attn_backend = attention.backend_behind_cut(each.attn_backend, own_blocks)
        for each in before if own_blocks else ():
            each.attn_backend = attention.backend_before_cut(each.attn_backend)
        watched = before[-1]
        watched.__class__ = _watched(watched.__class__)
        watched.dartfx_key = None
        head, tail = _halves()
        with vllm_api.set_model_tag("dartfx_head"):
            self.head = head(
                vllm_config=vllm_config, layers=decoder.layers[:layer], attention=watched
            )
        with vllm_api.set_model_tag("dartfx_tail"):
            self.tail = tail(
                vllm_config=vllm_config, layers=decoder.layers[layer:], norm=decoder.norm
            )
        self.config = config
        self.vllm_config = vllm_config
        self.attentions = behind
        self.names = [each.layer_name for each in behind]
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self.layer = cut.Layer(decoder.norm, watched, ranks)
        self.prompts = prompts_of(vllm_config)
        # The layers behind the cut are compiled, and have buffers, for this many rows at a time.
        self.most = vllm_config.scheduler_config.max_num_batched_tokens
        self.adapter_tables: list[Any] = []
        self.vision: Tensor | None = None
        self.tokens = self.tokens_behind_cut = 0

    def install(self, decoder: Any) -> None:
        """Redirect calls of ``decoder`` (this instance only) to :meth:`run`."""
        original = type(decoder)

        def call(
            module: Any,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
        ) -> Tensor:
            hidden = module.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            return self.run(positions, hidden)

        self.attentions[0].dartfx_when_ready = functools.partial(self._verify, original, decoder)
        decoder.__class__ = type(f"Pruned{original.__name__}", (original,), {"__call__": call})

    def run(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """[T, D] hidden states after the final norm, zero in rows that did not pass the cut."""
        vision, self.vision = self.vision, None
        hidden, residual, keys = self.head(positions, hidden)
        context = vllm_api.get_forward_context()
        if context.attn_metadata is None:  # vLLM measures memory or compiles
            return self.tail(positions, hidden, residual)  # type: ignore[no-any-return]
        batch = context.attn_metadata[self.names[0]].dartfx_source.batch
        parts = plan_step(
            batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist(),
            batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist(),
            self.prompts,
        )
        total = len(hidden)
        self.tokens += total
        counts = [part.end - part.start for part in parts]
        if not any(part.sees for part in parts):
            self.tokens_behind_cut += total
            return self._behind(context, parts, counts, positions, hidden, residual)
        if vision is None:
            vision = torch.zeros(total, dtype=torch.bool)
        keys = self.layer.keys(keys, self.config.selector)
        rows = cut.Rows(positions, hidden, residual, keys, vision)
        cut.hold(parts, rows)
        rows, held = cut.with_held(parts, rows)
        keep, counts = cut.rows_kept(self.config, self.layer, parts, rows, held)
        self.tokens_behind_cut += len(keep)
        positions = rows.positions[..., keep]
        passed = self._behind(
            context, parts, counts, positions, rows.hidden[keep], rows.residual[keep]
        )
        # Logits are indexed by row of the full batch; dropped rows are never read.
        output: Tensor = passed.new_zeros(len(rows), passed.shape[1])
        output[keep] = passed
        return output[:total]

    def _behind(
        self,
        context: Any,
        parts: list[Part],
        counts: list[int],
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor,
    ) -> Tensor:
        """Run the layers behind the cut on ``counts`` rows of each request."""
        if all(part.prompt is None for part in parts):
            return self.tail(positions, hidden, residual)  # type: ignore[no-any-return]
        groups = cut.group_by_metadata(context.attn_metadata, self.names)
        sources = [context.attn_metadata[names[0]].dartfx_source for names in groups]
        first = torch.tensor([part.start for part in parts], device=hidden.device)
        made, start = [hidden[:0]], 0
        for rows, lengths in pieces(counts, [part.length for part in parts], self.most):
            piece = cut.Piece(sources[0].batch, rows, lengths)
            for names, source in zip(groups, sources, strict=True):
                piece.put(context, source, names)
            now = slice(start, start + sum(rows))
            gather = functools.partial(
                _of_requests, first, torch.tensor(rows, device=hidden.device)
            )
            with _adapters(self.adapter_tables, gather):
                made.append(self.tail(positions[..., now].contiguous(), hidden[now], residual[now]))
            start = now.stop
        return torch.cat(made)

    @torch.inference_mode()
    def _verify(self, original: Any, decoder: Any, device: torch.device) -> None:
        """Compare the two halves with the decoder's own forward on a few random rows.

        Raises ConfigError where they differ: the decoder then does something around its layers that
        the halves do not.  Runs after weights are loaded, before anything is served.
        """
        model = self.vllm_config.model_config
        shape = (_TRIAL_ROWS, decoder.norm.weight.shape[0])
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        rows = rows.to(device, model.dtype)
        axes = (3,) if model.uses_mrope else ()
        at = torch.zeros((*axes, _TRIAL_ROWS), dtype=torch.int64, device=device)
        self.adapter_tables = vllm_api.adapter_tables(self.tail.modules())
        none = torch.full((_TRIAL_ROWS,), -1, device=device)
        context = vllm_api.set_forward_context(None, self.vllm_config, num_tokens=_TRIAL_ROWS)
        with context, _without_attention(decoder), _adapters(self.adapter_tables, lambda _: none):
            wanted = original.forward(decoder, None, at, None, rows.clone())
            middle, residual, _ = type(self.head).forward(self.head, at, rows.clone())
            made = type(self.tail).forward(self.tail, at, middle, residual)
        if not isinstance(wanted, Tensor) or not torch.allclose(made, wanted, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"dartfx cannot prune {original.__name__}: it does more than run its layers one "
                "after the other and norm the result; serve it without dartfx in "
                "--additional-config"
            )
