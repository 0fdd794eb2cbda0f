"""From logits to tokens: penalties, temperature, top-k / top-p / min-p, log-probabilities.

A row's token depends on its own logits, parameters, seed and position only, never on its neighbours in the batch: each
row draws one number from a counter-based hash of (seed, position) and inverts its own cumulative distribution, summed
in integers, for which the order of summation does not matter. Tokens are ranked by (logit descending, id ascending), so
ties are resolved the same way whatever the batch looks like.

A vocabulary of 150 000 is made cheap by reducing rows to the maxima of chunks first: a greedy row looks into its best
chunk only, and its K best tokens lie in its K best chunks. Rows are grouped by what they need and computed in tiles
that stay in the processor's cache; everything comes back to the host in one copy, which the caller begins at once and reads
later, so that the host can prepare the next step meanwhile.

Letters in shape comments: R rows, G rows of one tile, V vocabulary, C chunks of a row, K candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from backend.engine.penalties import SampleRow, penalised
from backend.engine.sampling_params import SamplingParams
from backend.kernels.transfer import HostCopy, to_device

__all__ = ["SampleRow", "Sampled", "Sampling", "sample", "uniform"]

CHUNK = 64
#: Elements of a tile on a CPU (4 MiB of float32); other devices take all rows of a group at once …
TILE_ELEMENTS = 2**20
#: … but for rows whose filters sort them: that takes some 60 bytes an element, beside a KV cache that fills the memory.
SORTED_ELEMENTS = 2**23
#: Candidates kept for rows with a top_k up to this …
SMALL_TOP_K = 64
#: … and for other filtered rows on a CPU, if the vocabulary is large; few rows' filters keep more.
MANY_CANDIDATES = 256
LARGE_VOCABULARY = 2**15

_LOW_32 = 2**32 - 1
_INT64_MIN = -(2**63)
_ULP = 2.0**-53
#: Weights (relative to the best token's) become integers in these units; V * 2^40 stays below 2^63.
_UNIT = 2.0**40
_FINE_UNIT = 2.0**52

# What a row needs, computed differently; part of the grouping key, so it may depend on the row's parameters only.
_GREEDY, _PLAIN, _TOP_K, _FILTERED = range(4)


@dataclass(slots=True)
class Sampled:
    """The token of one row. With `error` set there is no token (-1): that sequence must end, its neighbours are fine.

    `logprob` and `rank` (1 = most likely) are the token's under the model's own distribution, before penalties and
    filters; `top` are the `params.logprobs` most likely tokens with their log-probabilities.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: list[tuple[int, float]] | None = None
    error: str | None = None


class Sampling:
    """Tokens that are being chosen: `tokens` [R] int64 (-1: an error), and in `packed` all that `results` reads on the host.

    Both are on the logits' device.
    """

    def __init__(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Begin to choose one token per row; see `sample`."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} descriptions")
        self._rows, self._vocab = rows, logits.shape[1]
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(_kind(row.params, logits), []).append(index)
        order: list[int] = []
        chosen: list[Tensor] = [logits.new_empty(0, dtype=torch.int64)]
        for kind, members in groups.items():
            order += members
            for tile in _tiles(members, logits, SORTED_ELEMENTS if kind == _FILTERED else None):
                tile_rows = [rows[i] for i in tile]
                chosen.append(_choose(kind, penalised(_take(logits, tile), tile_rows), tile_rows))
        tokens = torch.cat(chosen)
        if len(groups) > 1:
            tokens = tokens[_to_device(np.argsort(order), np.int64, logits)]
        self.tokens = tokens
        reported = [i for i, row in enumerate(rows) if row.need_logprob or row.params.logprobs is not None]
        self._reported = list(_tiles(reported, logits)) if reported else []
        packed = [_report(_take(logits, tile), tokens, tile, rows) for tile in self._reported]
        self.packed = torch.cat([tokens.double(), *packed]) if reported else tokens

    def results(self, packed: np.ndarray) -> list[Sampled]:
        """From the values of `packed`."""
        numbers = iter(packed.tolist())
        results = [_sampled(int(token)) for token in islice(numbers, len(self._rows))]
        for tile in self._reported:
            _fill(results, tile, self._rows, numbers, self._vocab)
        return results


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [R, V] float32 on any device; not modified.
        rows: R descriptions.
    """
    sampling = Sampling(logits, rows)
    return sampling.results(*HostCopy(logits.device, sampling.packed).numpy())


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides about the token at `position`: a hash (splitmix64) of seed and position."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) * _ULP


def _mix(state: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), on 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def _kind(params: SamplingParams, logits: Tensor) -> int:
    if params.greedy:
        return _GREEDY
    vocab = logits.shape[1]
    # Small rows on a CPU are filtered whole sooner than their best chunks are found.
    if 0 < params.top_k <= min(SMALL_TOP_K, vocab) and (vocab > LARGE_VOCABULARY or logits.device.type != "cpu"):
        return _TOP_K
    if 0 < params.top_k < vocab or params.top_p < 1 or params.min_p > 0:
        return _FILTERED
    return _PLAIN


def _tiles(members: list[int], logits: Tensor, most_elements: int | None = None) -> Iterator[list[int]]:
    """`most_elements` of a tile on other devices than a CPU; None: all rows at once."""
    if logits.device.type == "cpu":
        most_elements = TILE_ELEMENTS
    size = len(members) if most_elements is None else max(1, most_elements // logits.shape[1])
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _take(logits: Tensor, indices: list[int]) -> Tensor:
    """Rows of logits: a view where they are neighbours, else a copy."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return logits[indices[0] : indices[-1] + 1]
    return logits.index_select(0, _to_device(indices, np.int64, logits))


def _to_device(values: object, dtype: type[np.generic], like: Tensor) -> Tensor:
    """A small host list as a tensor; the copy to a GPU does not wait for it."""
    return to_device([np.ascontiguousarray(values, dtype)], like.device)[0]


def _sampled(token: int) -> Sampled:
    error = None if token >= 0 else "the model produced logits that are not finite (NaN or infinity)"
    return Sampled(token, error=error)


# --- choosing -------------------------------------------------------------------------------------------------------


def _choose(kind: int, x: Tensor, rows: list[SampleRow]) -> Tensor:
    """[G] token ids for [G, V] processed logits; -1 for rows that are not finite."""
    if kind == _GREEDY and x.device.type != "cpu":
        best, tokens = x.max(-1, keepdim=True)  # the first among equals; one launch
        return torch.where(best.isfinite(), tokens, -1).squeeze(-1)
    maxima = _chunked(x, torch.amax)  # [G, C]
    best = maxima.amax(-1, keepdim=True)  # [G, 1], NaN if the row has one
    if kind == _GREEDY:
        tokens = _argmax(x, maxima)
    else:
        # u, 1/T, top_k, top_p, min_p, each [G, 1]
        settings = [
            (uniform(r.seed, r.position), 1 / r.params.temperature, r.params.top_k, r.params.top_p, r.params.min_p)
            for r in rows
        ]
        columns = _to_device(settings, np.float64, x).unsqueeze(-1).unbind(1)
        if kind == _PLAIN:
            tokens = _sample_all(x, best, *columns[:2])
        elif kind == _TOP_K:
            tokens, _ = _sample_prefix(*_best_tokens(x, maxima, SMALL_TOP_K), None, *columns)
        else:
            tokens = _sample_filtered(x, maxima, best, *columns)
    return torch.where(best.isfinite(), tokens, -1).squeeze(-1)


def _chunked(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """[G, V] → [G, C]: each chunk of CHUNK neighbours reduced to one number (the last one may be shorter)."""
    whole = x.shape[1] // CHUNK * CHUNK
    parts = [reduce(x[:, :whole].unflatten(1, (-1, CHUNK)), -1)] if whole else []
    if whole < x.shape[1]:
        parts.append(reduce(x[:, whole:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _columns(chunks: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """[G, n] chunk numbers → [G, n * CHUNK] the columns they cover, which of them exist (others repeat the last)."""
    columns = (chunks.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=chunks.device)).flatten(1)
    return columns.clamp(max=vocab - 1), columns < vocab


def _argmax(x: Tensor, maxima: Tensor) -> Tensor:
    """[G, 1] the best token, the lowest id among equals."""
    columns, _ = _columns(maxima.argmax(-1, keepdim=True), x.shape[1])
    return columns.gather(1, x.gather(1, columns).argmax(-1, keepdim=True))


def _sample_all(x: Tensor, best: Tensor, u: Tensor, inverse_temperature: Tensor) -> Tensor:
    """[G, 1] tokens from the whole distribution: first the chunk, then the token in it."""
    weights = _weights(x, best, inverse_temperature)
    mass = _to_units(_chunked(weights, torch.sum), _UNIT)  # [G, C]
    chunk, rest = _invert(mass, u)
    columns, exists = _columns(chunk, x.shape[1])
    inner = torch.where(exists, _to_units(weights.gather(1, columns), _FINE_UNIT), 0)
    return columns.gather(1, _invert(inner, rest)[0])


def _weights(x: Tensor, best: Tensor, inverse_temperature: Tensor) -> Tensor:
    """exp((x - best) / T), in (0, 1]."""
    return x.sub(best).mul_(inverse_temperature.to(x.dtype)).exp_()


def _to_units(weights: Tensor, unit: float) -> Tensor:
    return torch.nan_to_num(weights.double() * unit, nan=0.0, posinf=0.0).long()


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF: where u of the total of [G, n] integers falls, and how far into that element, a share in [0, 1)."""
    ends = mass.cumsum(-1)
    total = ends[:, -1:]
    target = torch.minimum((u * total.double()).long(), total - 1)
    index = torch.searchsorted(ends, target, right=True).clamp_(max=mass.shape[1] - 1)
    size = mass.gather(1, index)
    rest = (target - (ends.gather(1, index) - size)).double() / size.clamp(min=1)
    return index, rest


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose descending order is (value descending, id ascending); all different."""
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_32 - ids)


def _ids_of(keys: Tensor) -> Tensor:
    return _LOW_32 - (keys & _LOW_32)


def _best_tokens(x: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[G, K] logits and ids of the K = min(count, V) best tokens in order. They lie in the K best chunks."""
    numbers = torch.arange(maxima.shape[1], device=x.device)
    chunks = _ids_of(_keys(maxima, numbers).topk(min(count, maxima.shape[1]), sorted=False).values)
    columns, exists = _columns(chunks, x.shape[1])
    keys = torch.where(exists, _keys(x.gather(1, columns), columns), _INT64_MIN)
    ids = _ids_of(keys.topk(min(count, x.shape[1])).values)
    return x.gather(1, ids), ids


def _sample_prefix(
    values: Tensor,
    ids: Tensor,
    mass: Tensor | None,
    u: Tensor,
    inverse_temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample among the best tokens: every filter keeps a prefix of them.

    Args:
        values, ids: [G, K] logits and ids of the best tokens in order.
        mass: [G, 1] weight of the whole row in units, or None if K tokens are all that top_k leaves.
        u … min_p: [G, 1].

    Returns:
        [G, 1] tokens, and [G, 1] whether K candidates were enough.
    """
    weights = _weights(values, values[:, :1], inverse_temperature)
    units = _to_units(weights, _UNIT)
    limited = top_k > 0
    number = torch.arange(values.shape[1], device=values.device)
    units = torch.where((number < top_k) | ~limited, units, 0)
    ends = units.cumsum(-1)
    total = ends[:, -1:]
    if mass is not None:
        total = torch.where(limited, total, torch.maximum(total, mass))
    nucleus = top_p * total.double()
    kept = torch.where(((ends - units).double() < nucleus) & (weights >= min_p), units, 0)
    filtered = (kept[:, -1:] == 0) | (ends[:, -1:].double() >= nucleus)
    enough = torch.where(limited, top_k <= values.shape[1], filtered)
    return ids.gather(1, _invert(kept, u)[0]), enough


def _sample_filtered(x: Tensor, maxima: Tensor, best: Tensor, *columns: Tensor) -> Tensor:
    """[G, 1] tokens of rows whose filters may keep any number of tokens."""
    vocab = x.shape[1]
    if x.device.type != "cpu":
        return _sample_sorted(x, *columns)
    weights = _weights(x, best, columns[1])
    if vocab > LARGE_VOCABULARY:
        mass = _to_units(_chunked(weights, torch.sum), _UNIT).sum(-1, keepdim=True)
        tokens, enough = _sample_prefix(*_best_tokens(x, maxima, MANY_CANDIDATES), mass, *columns)
    else:
        tokens, enough = torch.zeros_like(best, dtype=torch.int64), torch.zeros_like(best, dtype=torch.bool)
    rows = (~enough & best.isfinite()).flatten().nonzero().flatten()
    if len(rows):
        from backend.kernels.cpu.nucleus import sample_rows  # not at the top: a GPU needs no compiler for a CPU

        u, _, *filters = (column.flatten().numpy() for column in columns)
        tokens[rows, 0] = torch.from_numpy(sample_rows(weights.numpy(), rows.numpy(), u, *filters))
    return tokens


def _sample_sorted(x: Tensor, *columns: Tensor) -> Tensor:
    """`_sample_filtered` without a look at the numbers, which would make the host wait for the device."""
    values, ids = x.sort(descending=True, stable=True)  # the lowest id first among equals
    return _sample_prefix(values, ids, None, *columns)[0]


# --- log-probabilities ----------------------------------------------------------------------------------------------


def _num_top(tile: list[int], rows: Sequence[SampleRow]) -> int:
    return max(rows[i].params.logprobs or 0 for i in tile)


def _report(x: Tensor, tokens: Tensor, tile: list[int], rows: Sequence[SampleRow]) -> Tensor:
    """Flat float64: per row of [G, V] raw logits its token's log-probability and rank, the best ids, their values."""
    logprobs = x.log_softmax(-1)
    own = logprobs.gather(1, _take(tokens, tile).clamp(min=0).unsqueeze(-1))
    parts = [own, (logprobs > own).sum(-1, keepdim=True) + 1]
    if count := _num_top(tile, rows):
        values, ids = _best_tokens(logprobs, _chunked(logprobs, torch.amax), count)
        parts += [ids, values]
    return torch.cat([part.double() for part in parts], 1).flatten()


def _fill(
    results: list[Sampled], tile: list[int], rows: Sequence[SampleRow], numbers: Iterator[float], vocab: int
) -> None:
    """Unpack what `_report` made of the same tile into the results."""
    count = min(_num_top(tile, rows), vocab)
    for index in tile:
        result, wanted = results[index], rows[index].params.logprobs
        logprob, rank, *best = islice(numbers, 2 + 2 * count)
        if result.error is None:
            result.logprob, result.rank = logprob, int(rank)
            if wanted is not None:
                pairs = zip(map(int, best[:count]), best[count:], strict=True)
                result.top = list(islice(pairs, wanted))
