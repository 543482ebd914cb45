"""Grids of patches, and a context over them that only looks up."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def grid_side(image_size: int, patch_size: int, stride: int) -> int:
    """How many patches of `patch_size` pixels, `stride` apart, fit along one side of an image."""
    return (image_size - patch_size) // stride + 1


def cut_patches(images: Float[Tensor, "n c s s"], patch_size: int, stride: int) -> Float[Tensor, "p c q q"]:
    """All patches [N·G·G, C, Q, Q] of `images` [N, C, S, S], image by image, row by row; they may overlap."""
    windows = images.unfold(2, patch_size, stride).unfold(3, patch_size, stride)  # [N, C, G, G, Q, Q]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


class _RowCausalBlock(nn.Module):
    """A residual block whose output at row i depends on rows i - 1 and i of its input alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # Statistics over the grid would carry rows below into rows above: normalize each position by itself.
        self.norm = nn.LayerNorm(size)
        self.conv = nn.Conv2d(size, size, kernel_size=(2, 3))
        self.out = nn.Conv2d(size, size, kernel_size=1)

    def forward(self, x: Float[Tensor, "n g g d"]) -> Float[Tensor, "n g g d"]:
        y = self.norm(x).permute(0, 3, 1, 2)
        y = self.conv(F.pad(y, (1, 1, 1, 0)))  # one row of zeros above, none below
        return x + self.out(F.relu(y)).permute(0, 2, 3, 1)


class RowContext(nn.Module):
    """The context c of a grid of embeddings z: c at row i sees all columns' z of row i and of the rows above.

    CPC's autoregressive network over rows (van den Oord et al. 2018, section 3.2; Henaff et al. 2020, section 3.1, where
    it is a PixelCNN), as residual row-causal convolutions. Each layer sees one row further up.
    """

    def __init__(self, input_size: int, size: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(input_size, size)
        self.blocks = nn.Sequential(*[_RowCausalBlock(size) for _ in range(layers)])
        self.norm = nn.LayerNorm(size)

    def forward(self, z: Float[Tensor, "n g g e"]) -> Float[Tensor, "n g g d"]:
        """[N, G, G, E] to [N, G, G, D]."""
        context: Tensor = self.norm(self.blocks(self.first(z)))
        return context


class RowPredictions(nn.Module):
    """One linear map W_k for each number of rows ahead, k = 1 to `rows_ahead` (van den Oord et al. 2018, equation 3)."""

    def __init__(self, context_size: int, output_size: int, rows_ahead: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(context_size, output_size, bias=False) for _ in range(rows_ahead))

    def forward(self, context: Float[Tensor, "n g g d"]) -> list[Tensor]:
        """For each k the predictions [N, G - k, G, E] of rows k to G - 1, made from rows 0 to G - 1 - k."""
        rows = context.shape[1]
        return [linear(context[:, : rows - k]) for k, linear in enumerate(self.maps, start=1)]
