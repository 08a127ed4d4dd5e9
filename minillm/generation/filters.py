"""The logits filters: what happens to a row of scores between the model and the draw.

Each function is pure: logits (B, V) float32 in, (B, V) out, the input untouched. A removed token gets -inf, so its
probability is exactly 0. Numbers and names are those of Hugging Face `generate`; the order is part of the definition:

    repetition_penalty -> no_repeat_ngram -> forbid -> temperature -> top_k -> top_p -> min_p -> typical
    ------------- what may be said, always --------    ------------ how it is drawn, if sampling ----------

Below, x is a row of logits and p = softmax(x). The last five keep at least one token of a row that has one. The history
of a row is its own real tokens, prompt and answer: `tokens` (B, S) int64 with `keep` (B, S) bool, True where the token
is real and False where it is padding.

Where we differ from transformers, on purpose: padding is never history. Its `no_repeat_ngram` counts left padding, so
that a padded row may be forbidden what the same row alone may say; here the two are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A nucleus is nearly always small: look for it here before sorting the vocabulary (0.4 ms against 10 ms at V = 128k).
_HEAD = 1024


def repetition_penalty(logits: Tensor, tokens: Tensor, keep: Tensor, *, penalty: float) -> Tensor:
    """Make every token of the history less likely, once however often it occurred (CTRL, arXiv 1909.05858 §4.1).

        x_v <- x_v / penalty  if x_v >= 0,  x_v * penalty  if x_v < 0            for v in the history

    logits (B, V), tokens (B, S) int64, keep (B, S) bool -> (B, V). A penalty above 1 discourages, below 1 rewards. The
    paper always divides; the sign test is the convention of transformers (dividing a negative score would reward it).

    >>> tokens, keep = torch.tensor([[2, 0, 1]]), torch.tensor([[False, True, True]])               # 2 is padding
    >>> repetition_penalty(torch.tensor([[2., -2., 1.]]), tokens, keep, penalty=2.)
    tensor([[ 1., -4.,  1.]])
    """
    rows, ids = _history(tokens, keep)
    scores = logits[rows, ids]
    penalised = logits.clone()
    # A token that occurs twice is written twice with the same value: the order of writing does not matter.
    penalised[rows, ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return penalised


def no_repeat_ngram(logits: Tensor, tokens: Tensor, keep: Tensor, *, size: int) -> Tensor:
    """Forbid each token that would complete an n-gram the history already holds (arXiv 1705.04304 §2.5, as in fairseq).

        remove v  if  (h_{S-n+1} ... h_{S-1}, v) = (h_i ... h_{i+n-1}) for some i           h the history, n = size

    logits (B, V), tokens (B, S) int64, keep (B, S) bool -> (B, V). Size 1 forbids every token seen. Can remove all
    tokens of a row (size 1 and a long text); `choose` then says so.

    >>> tokens, keep = torch.tensor([[1, 3, 1]]), torch.ones(1, 3, dtype=torch.bool)
    >>> no_repeat_ngram(torch.zeros(1, 4), tokens, keep, size=2)                      # 1 was followed by 3
    tensor([[0., 0., 0., -inf]])
    """
    if tokens.shape[1] < size:
        return logits
    windows = tokens.unfold(1, size, 1)  # (B, S - n + 1, n)
    suffix = tokens[:, None, tokens.shape[1] + 1 - size :]  # (B, 1, n - 1)
    repeats = (windows[..., :-1] == suffix).all(-1) & keep.unfold(1, size, 1).all(-1)  # (B, S - n + 1)
    rows, starts = repeats.nonzero(as_tuple=True)
    allowed = logits.clone()
    allowed[rows, windows[rows, starts, -1]] = -torch.inf
    return allowed


def forbid(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Remove the tokens `ids` from every row: EOS, while fewer than `min_new_tokens` are written.

    logits (B, V) -> (B, V). An id of V or more is ignored: the model cannot write it.

    >>> forbid(torch.zeros(1, 3), [1])
    tensor([[0., -inf, 0.]])
    """
    possible = [token for token in ids if token < logits.shape[1]]
    return logits.index_fill(1, torch.tensor(possible, dtype=torch.int64, device=logits.device), -torch.inf)


def temperature(logits: Tensor, *, value: float) -> Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution: x <- x / value.     logits (B, V) -> (B, V)

    >>> temperature(torch.tensor([[1., 2.]]), value=0.5)
    tensor([[2., 4.]])
    """
    return logits / value


def top_k(logits: Tensor, *, k: int) -> Tensor:
    """Keep the k largest (arXiv 1805.04833 §5.4): remove v if x_v < the k-th largest x.     logits (B, V) -> (B, V)

    Tokens equal to the k-th all survive, so ties can leave more than k (as in transformers). k above V keeps all.

    >>> top_k(torch.tensor([[3., 1., 2., 2.]]), k=2)
    tensor([[3., -inf, 2., 2.]])
    """
    smallest = logits.topk(min(k, logits.shape[1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Tensor, *, p: float) -> Tensor:
    """Keep the nucleus: the fewest most likely tokens that together hold mass p (arXiv 1904.09751 §3.1, eq. 2).

        remove v  if  the tokens ranked above v hold at least p                logits (B, V) -> (B, V), 0 < p <= 1

    Where tokens tie at the edge, as many stay as are needed; which ones is left to the sort, as in transformers.
    Difference: the mass is summed from the top in float64; transformers sums float32 from the bottom against 1 - p. A
    token within float32 rounding of the edge can therefore fall on the other side.

    >>> top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), p=0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    ids, reached, own = _ranked(logits, logits.softmax(-1), mass=p)
    above = reached - own
    kept = torch.where(above >= p, -torch.inf, logits.gather(1, ids))
    return torch.full_like(logits, -torch.inf).scatter_(1, ids, kept)


def min_p(logits: Tensor, *, p: float) -> Tensor:
    """Keep what is at least p times as likely as the best token (arXiv 2407.01082 §3): remove v if p_v < p * max p.

    logits (B, V) -> (B, V), 0 <= p <= 1; ties with the bound survive.

    >>> min_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), p=0.5).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def typical(logits: Tensor, *, p: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, up to mass p (arXiv 2202.00666 §4, eq. 10).

        H = -sum_v p_v log p_v          d_v = | -log p_v - H |
        remove v  if  d_v > d of the token at which the mass, gathered in rising d, first reaches p

    logits (B, V) -> (B, V), 0 < p <= 1. The most likely token may go. Ties with the last kept d survive (as in
    transformers); the mass is summed in float64, as in `top_p`: at V = 128k and p = 0.999 transformers' float32
    is some hundred tokens off the formula.

    >>> typical(torch.tensor([[0.6, 0.3, 0.1]]).log(), p=0.2).exp()
    tensor([[0.0000, 0.3000, 0.0000]])
    """
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    # nansum: -inf * 0 is NaN, and a removed token adds nothing. float64: torch orders a sum by the shape of the whole
    # batch, and in float32 the row would feel that.
    entropy = -(logprobs * probabilities).nansum(-1, keepdim=True, dtype=torch.float64).float()  # (B, 1)
    distance = (-logprobs - entropy).abs()
    ids, reached, _ = _ranked(-distance, probabilities, mass=p)
    last = (reached < p).sum(-1, keepdim=True).clamp_(max=ids.shape[1] - 1)  # (B, 1)
    bound = distance.gather(1, ids.gather(1, last))
    return logits.masked_fill(distance > bound, -torch.inf)


def _history(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens as (row, id) pairs: (B, S), (B, S) bool -> two (N,) int64."""
    rows, columns = keep.nonzero(as_tuple=True)
    return rows, tokens[rows, columns]


def _ranked(key: Tensor, probabilities: Tensor, *, mass: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in falling `key` until every row has `mass`: ids (B, K), mass through each (B, K), own mass (B, K).

    K is 1024 if that is enough, else V. Masses are float64 shares of the row's float64 sum: a float32 softmax over 128k
    tokens can miss a sum of 1 by 1e-5, which at the end of a nucleus is a hundred tokens.
    """
    vocabulary = key.shape[1]
    total = probabilities.sum(-1, keepdim=True, dtype=torch.float64)  # (B, 1)
    for count in (min(_HEAD, vocabulary), vocabulary):
        ids = key.topk(count).indices
        own = probabilities.gather(1, ids) / total
        reached = own.cumsum(-1)
        if bool((reached[:, -1] >= mass).all()):
            break
    return ids, reached, own
