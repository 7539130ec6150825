"""What figures share: colours, an empty one, and how it becomes a PNG file.

They are drawn through Matplotlib's object interface: the caller's backend and pyplot state are never touched.
"""

import io
import os
from pathlib import Path

from .files import write_atomically

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ImportError as error:
    raise ImportError("wgan_fast's figures need Matplotlib: pip install 'wgan_fast[train]'") from error

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, apart from pyplot's."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure into a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())
