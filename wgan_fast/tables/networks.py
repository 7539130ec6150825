"""CTGAN's networks (Xu et al. 2019, arXiv:1907.00503), and the conditions that they are trained under."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gumbel_softmax

from .preparation import Span

TEMPERATURE = 0.2


class Residual(nn.Module):
    """A layer whose input stands beside its output."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, width + features]`` for ``[N, features]``."""
        return torch.cat([self.layers(x), x], dim=1)


class TableGenerator(nn.Module):
    """Noise and a condition to what is activated to rows.

    Args:
        spans: Of the rows.
        latent_dim: Length of the noise.
        condition: Length of the condition.
        hidden: Widths of the residual layers.
    """

    def __init__(self, spans: Sequence[Span], latent_dim: int, condition: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.spans, self.latent_dim = list(spans), latent_dim
        layers: list[nn.Module] = []
        features = latent_dim + condition
        for width in hidden:
            layers.append(Residual(features, width))
            features += width
        self.layers = nn.Sequential(*layers, nn.Linear(features, sum(span.width for span in spans)))

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        """Return ``[N, width]``, not activated, for ``[N, latent_dim]`` and ``[N, condition]``."""
        raw: Tensor = self.layers(torch.cat([noise, condition], dim=1))
        return raw

    def make(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Draw noise and return the row for each condition ``[N, condition]``: not activated, and activated."""
        raw = self(torch.randn(len(condition), self.latent_dim, device=condition.device), condition)
        return raw, self.activated(raw)

    def activated(self, raw: Tensor) -> Tensor:
        """Return rows: tanh of values, and of one of several a soft choice, drawn with Gumbel noise."""
        parts = torch.split(raw, [span.width for span in self.spans], dim=1)
        made = [
            part.tanh() if span.kind == "value" else gumbel_softmax(part, tau=TEMPERATURE)
            for part, span in zip(parts, self.spans)
        ]
        return torch.cat(made, dim=1)


class Rows(nn.Module):
    """The rows of a table on a device, in eight bytes a column at most, and spread out when they are taken.

    Args:
        values: Of every span of values ``[N, values]``.
        choices: What is chosen of every span of choices ``[N, choices]``, integers.
        spans: Of a row.
    """

    values: Tensor
    choices: Tensor
    values_at: Tensor
    choices_at: Tensor

    def __init__(self, values: Tensor, choices: Tensor, spans: Sequence[Span]) -> None:
        super().__init__()
        starts = torch.tensor([0, *(span.width for span in spans)]).cumsum(0)[:-1]
        of_values = torch.tensor([span.kind == "value" for span in spans])
        self.width = sum(span.width for span in spans)
        self.register_buffer("values", values)
        self.register_buffer("choices", choices)
        self.register_buffer("values_at", starts[of_values])
        self.register_buffer("choices_at", starts[~of_values])

    def __len__(self) -> int:
        return len(self.values)

    def take(self, which: Tensor) -> Tensor:
        """Return the rows ``[n, width]`` of their numbers ``[n]``: values, and 1 at what is chosen."""
        out = self.values.new_zeros(len(which), self.width)
        out[:, self.values_at] = self.values[which]
        return out.scatter_(1, self.choices[which] + self.choices_at, 1.0)


class Conditions(nn.Module):
    """Draws conditions, one category of one column, and rows that meet them, on the device of its buffers.

    Where no column has categories, a condition is nothing, which every row meets.

    Args:
        codes: The category of every row in every column of categories ``[N, columns]``, int32.
        sizes: How many categories each column has.
        starts: Where in a row of the generator each column of categories begins.
    """

    counts: Tensor
    order: Tensor
    first: Tensor
    offsets: Tensor

    def __init__(self, codes: Tensor, sizes: Sequence[int], starts: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.starts, self.rows = list(sizes), list(starts), len(codes)
        most = max(sizes, default=0)
        counts = torch.zeros(len(sizes), most)
        first = torch.zeros(len(sizes), most, dtype=torch.int64)
        order = torch.zeros(len(sizes), len(codes), dtype=torch.int32)
        for i, size in enumerate(sizes):
            counts[i, :size] = torch.bincount(codes[:, i], minlength=size).float()
            first[i] = counts[i].cumsum(0).long() - counts[i].long()
            order[i] = codes[:, i].argsort(stable=True).int()
        self.register_buffer("counts", counts)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *sizes]).cumsum(0)[:-1], persistent=False)

    @property
    def width(self) -> int:
        """Length of a condition; 0 where there is no column of categories."""
        return sum(self.sizes)

    def draw(self, count: int, *, balanced: bool = True) -> tuple[Tensor, Tensor]:
        """Draw columns, each as likely, and a category of each, by the logarithm of its frequency or as it is.

        Returns:
            Columns ``[count]`` and categories ``[count]``.
        """
        if not self.sizes:
            nothing = torch.zeros(count, dtype=torch.int64, device=self.counts.device)
            return nothing, nothing
        columns = torch.randint(len(self.sizes), (count,), device=self.counts.device)
        weights = self.counts.log1p() if balanced else self.counts
        return columns, torch.multinomial(weights[columns], 1)[:, 0]

    def encoded(self, columns: Tensor, categories: Tensor) -> Tensor:
        """Return conditions ``[count, width]``: 1 at the category."""
        out = torch.zeros(len(columns), self.width, device=self.counts.device)
        return out.scatter_(1, (self.offsets[columns] + categories)[:, None], 1.0) if self.sizes else out

    def rows_of(self, columns: Tensor, categories: Tensor) -> Tensor:
        """Draw the number of a row for each condition ``[count]``."""
        if not self.sizes:
            return torch.randint(self.rows, (len(columns),), device=columns.device)
        among = (torch.rand(len(columns), device=columns.device) * self.counts[columns, categories]).long()
        last = self.counts[columns, categories].long() - 1
        return self.order[columns, self.first[columns, categories] + among.minimum(last)].long()

    def loss(self, raw: Tensor, columns: Tensor, categories: Tensor) -> Tensor:
        """Return the mean cross entropy of what the generator gave for the column of each condition."""
        total = raw.new_zeros(len(raw))
        for i, (start, size) in enumerate(zip(self.starts, self.sizes)):
            asked = columns == i
            found = cross_entropy(raw[:, start : start + size], categories.clamp(max=size - 1), reduction="none")
            total = total + found.where(asked, 0.0)
        return total.mean()
