"""The temporal figures as their definitions say, in loops: nothing of sums, units or sparse codes."""

from __future__ import annotations

import math
from collections import Counter

from tcsae.evaluate.information import thirds_of
from tcsae.evaluate.temporal_codes import Codes


class Slow:
    """One feature's figures in loops, on some documents."""

    def __init__(self, codes: Codes, feature: int, documents: list[int]) -> None:
        thirds = thirds_of([codes], codes.d_sae)
        self.f = [float(v) for v in codes.dense()[:, feature]]
        self.step = codes.step.tolist()
        self.context, self.document = codes.context.tolist(), codes.document.tolist()
        bounds = float(thirds.lower[feature]), float(thirds.upper[feature])
        self.state = [0 if v == 0 else 1 + sum(v > bound for bound in bounds) for v in self.f]
        self.counted = [bool(c) and d in documents for c, d in zip(codes.counted, self.document, strict=True)]
        self.tokens = [t for t, c in enumerate(self.counted) if c]

    def pairs(self, lag: int) -> list[tuple[int, int]]:
        return [
            (t, t + lag)
            for t in range(len(self.f) - lag)
            if self.counted[t] and self.counted[t + lag] and self.context[t] == self.context[t + lag]
        ]

    def autocorrelation(self, lag: int) -> float:
        mean = sum(self.f[t] for t in self.tokens) / len(self.tokens)
        variance = sum((self.f[t] - mean) ** 2 for t in self.tokens) / len(self.tokens)
        products = [(self.f[a] - mean) * (self.f[b] - mean) for a, b in self.pairs(lag)]
        return sum(products) / len(products) / variance

    def within_autocorrelation(self, lag: int) -> float:
        mean = {}
        for document in set(self.document):
            values = [self.f[t] for t in self.tokens if self.document[t] == document]
            mean[document] = sum(values) / len(values) if values else 0.0
        g = [v - mean[d] for v, d in zip(self.f, self.document, strict=True)]
        variance = sum(g[t] ** 2 for t in self.tokens) / len(self.tokens)
        products = [g[a] * g[b] for a, b in self.pairs(lag)]
        return sum(products) / len(products) / variance

    def persistence(self, lag: int) -> float:
        later = [self.f[b] > 0 for a, b in self.pairs(lag) if self.f[a] > 0]
        return sum(later) / len(later) - sum(self.f[t] > 0 for t in self.tokens) / len(self.tokens)

    def information(self, lag: int) -> float:
        pairs = [(self.state[a], self.state[b]) for a, b in self.pairs(lag)]

        def entropy(counts: Counter[object]) -> float:
            n = len(pairs)
            return -sum(c / n * math.log(c / n) for c in counts.values()) + (len(counts) - 1) / (2 * n)

        first, second = entropy(Counter(a for a, _ in pairs)), entropy(Counter(b for _, b in pairs))
        return (first + second - entropy(Counter(pairs))) / ((first + second) / 2)

    def run_length(self) -> float:
        lengths: list[int] = []
        before = None
        for t in self.tokens:
            if self.f[t] > 0:
                goes_on = before == t - 1 and self.context[before] == self.context[t] and self.f[before] > 0
                if goes_on:
                    lengths[-1] += 1
                else:
                    lengths.append(1)
            before = t
        return sum(lengths) / len(lengths)

    def smoothness(self) -> float:
        steepest = []
        for context in dict.fromkeys(self.context):
            slopes = [
                abs(self.f[b] - self.f[a]) / self.step[b]
                for a, b in self.pairs(1)
                if self.context[a] == context
            ]
            is_on = any(self.f[t] > 0 for a, b in self.pairs(1) if self.context[a] == context for t in (a, b))
            if is_on:
                steepest.append(max(slopes))
        return sum(steepest) / len(steepest)

    def total_variation(self) -> float:
        return sum(abs(self.f[b] - self.f[a]) for a, b in self.pairs(1)) / sum(self.f[t] for t in self.tokens)
