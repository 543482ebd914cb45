"""How a run's evaluation sees images (`EvalView`), as an ONNX graph: uint8 images of any size in, normalized squares out.

The filter is that of `data.crops`, and so are its sums: each tap in turn, in single precision. A sum in another order could round
a pixel to its neighbour, which a deep network makes more of. So this is neither ONNX's Resize nor a matrix product.
"""

from typing import TYPE_CHECKING

import numpy as np

from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.exporting.names import IMAGES

if TYPE_CHECKING:
    import onnx

PIXELS = "pixels"
"""What it gives: float32 [n, 3, S, S]."""
OPSET, IR_VERSION = 20, 10


def preprocessing(view: EvalView) -> "onnx.GraphProto":
    """A graph from `IMAGES` uint8 [n, h, w, 3] to `PIXELS`. Other names in it begin with `see_`."""
    import onnx

    graph = onnx.parser.parse_graph(_text())
    constants: dict[str, np.ndarray] = {
        "see_size": np.array(view.size, np.int64),
        "see_crop": np.array(view.crop, np.float64),
        "see_scale": np.array([1 / (255 * std) for std in view.std], np.float32),
        "see_shift": np.array([-mean / std for mean, std in zip(view.mean, view.std, strict=True)], np.float32),
        "see_shape": np.array([-1, view.size, view.size, 3], np.int64),
        "see_minus_one": np.array(-1, np.int64),
        "see_axes": np.array([1, 2], np.int64),
        "see_last_axis": np.array([1], np.int64),
        "see_true": np.array(True),
    }
    for kind, dtype, values in (
        ("i", np.int64, {"0": 0, "1": 1, "2": 2}), ("d", np.float64, {"0": 0.0, "half": 0.5, "1": 1.0}),
        ("f", np.float32, {"0": 0.0, "half": 0.5, "1": 1.0}),
    ):  # fmt: skip
        constants |= {f"see_{kind}{name}": np.array(value, dtype) for name, value in values.items()}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return graph


def _text() -> str:
    """In ONNX's own language. `small`: the square has no more pixels a side than the view."""
    return f"""
    see (uint8[n, h, w, 3] {IMAGES}) => (float[n, 3, s, s] {PIXELS}) {{
        {_square()}
        {_taps()}
        {_resize("see_source", "see_lines", "see_f0")}
        see_turned = Transpose <perm = [0, 2, 1, 3]> (see_lines)
        see_start = Where (see_small, see_fhalf, see_f0)
        {_resize("see_turned", "see_view_turned", "see_start")}
        see_view = If (see_small) <
            then_branch = see_enlarged () => (float[n, s, s, 3] see_upright) {{
                see_upright = Transpose <perm = [0, 2, 1, 3]> (see_view_turned)
            }},
            else_branch = see_reduced () => (float[n, s, s, 3] see_rounding) {{
                see_rounding = Add (see_view_turned, see_fhalf)
            }}
        >
        see_bytes = Floor (see_view)
        see_shaped = Reshape (see_bytes, see_shape)
        see_scaled = Mul (see_shaped, see_scale)
        see_normal = Add (see_scaled, see_shift)
        {PIXELS} = Transpose <perm = [0, 3, 1, 2]> (see_normal)
    }}
    """


def _square() -> str:
    """The centred square, as float32 [n, side, side, 3]; where it is reduced, rows and columns change places: `crops` then begins
    with what are rows."""
    return f"""
        see_h1 = Shape <start: int = 1, end: int = 2> ({IMAGES})
        see_w1 = Shape <start: int = 2, end: int = 3> ({IMAGES})
        see_shorter = Min (see_h1, see_w1)
        see_shorter_d = Cast <to: int = 11> (see_shorter)
        see_side_d = Mul (see_shorter_d, see_crop)
        see_side_r = Round (see_side_d)
        see_side_i = Cast <to: int = 7> (see_side_r)
        see_side1 = Max (see_side_i, see_i1)
        see_over_h = Sub (see_h1, see_side1)
        see_over_w = Sub (see_w1, see_side1)
        see_top = Div (see_over_h, see_i2)
        see_left = Div (see_over_w, see_i2)
        see_bottom = Add (see_top, see_side1)
        see_right = Add (see_left, see_side1)
        see_starts = Concat <axis: int = 0> (see_top, see_left)
        see_ends = Concat <axis: int = 0> (see_bottom, see_right)
        see_cut = Slice ({IMAGES}, see_starts, see_ends, see_axes)
        see_cut_f = Cast <to: int = 1> (see_cut)
        see_side = Squeeze (see_side1)
        see_small = LessOrEqual (see_side, see_size)
        see_source = If (see_small) <
            then_branch = see_rows_first () => (float[n, y, x, 3] see_as_it_is) {{
                see_as_it_is = Identity (see_cut_f)
            }},
            else_branch = see_columns_first () => (float[n, y, x, 3] see_on_its_side) {{
                see_on_its_side = Transpose <perm = [0, 2, 1, 3]> (see_cut_f)
            }}
        >
    """


def _taps() -> str:
    """`crops._triangle_weights`: the first tap of each output int64 [S], the weights float32 [S, K], and the border."""
    return """
        see_side_f64 = Cast <to: int = 11> (see_side)
        see_size_f64 = Cast <to: int = 11> (see_size)
        see_ratio = Div (see_side_f64, see_size_f64)
        see_i = Range (see_i0, see_size, see_i1)
        see_i_f64 = Cast <to: int = 11> (see_i)
        see_i_half = Add (see_i_f64, see_dhalf)
        see_center = Mul (see_ratio, see_i_half)
        see_border = Sub (see_side, see_i1)

        see_position = Sub (see_center, see_dhalf)
        see_floor = Floor (see_position)
        see_low_d = Max (see_floor, see_d0)
        see_low_enlarged = Cast <to: int = 7> (see_low_d)
        see_beyond = Sub (see_position, see_low_d)
        see_share_d = Max (see_beyond, see_d0)
        see_share_f = Cast <to: int = 1> (see_share_d)
        see_within = Less (see_low_enlarged, see_border)
        see_share = Where (see_within, see_share_f, see_f0)
        see_rest = Sub (see_f1, see_share)

        see_inverse_d = Div (see_d1, see_ratio)
        see_inverse = Cast <to: int = 1> (see_inverse_d)
        see_begin = Sub (see_center, see_ratio)
        see_begin_half = Add (see_begin, see_dhalf)
        see_begin_i = Cast <to: int = 7> (see_begin_half)
        see_low_reduced = Max (see_begin_i, see_i0)
        see_end = Add (see_center, see_ratio)
        see_end_half = Add (see_end, see_dhalf)
        see_end_i = Cast <to: int = 7> (see_end_half)
        see_end_in = Min (see_end_i, see_side)
        see_num = Sub (see_end_in, see_low_reduced)
        see_low_reduced_d = Cast <to: int = 11> (see_low_reduced)
        see_offset_c = Sub (see_low_reduced_d, see_center)
        see_offset_d = Add (see_offset_c, see_dhalf)
        see_offset = Cast <to: int = 1> (see_offset_d)

        see_most = ReduceMax <keepdims: int = 0> (see_num)
        see_num_taps = Where (see_small, see_i2, see_most)
        see_k = Range (see_i0, see_num_taps, see_i1)
        see_k_f = Cast <to: int = 1> (see_k)

        see_offset_col = Unsqueeze (see_offset, see_last_axis)
        see_from_center = Add (see_k_f, see_offset_col)
        see_slope = Mul (see_from_center, see_inverse)
        see_distance = Abs (see_slope)
        see_height = Sub (see_f1, see_distance)
        see_triangle = Max (see_height, see_f0)
        see_num_col = Unsqueeze (see_num, see_last_axis)
        see_own = Less (see_k, see_num_col)
        see_weights_own = Where (see_own, see_triangle, see_f0)
        see_sums = CumSum (see_weights_own, see_i1)
        see_total = Gather <axis: int = 1> (see_sums, see_minus_one)
        see_total_col = Unsqueeze (see_total, see_last_axis)
        see_weights_reduced = Div (see_weights_own, see_total_col)

        see_rest_col = Unsqueeze (see_rest, see_last_axis)
        see_share_col = Unsqueeze (see_share, see_last_axis)
        see_is_first = Equal (see_k, see_i0)
        see_is_second = Equal (see_k, see_i1)
        see_second = Where (see_is_second, see_share_col, see_f0)
        see_weights_enlarged = Where (see_is_first, see_rest_col, see_second)

        see_first = Where (see_small, see_low_enlarged, see_low_reduced)
        see_weights = Where (see_small, see_weights_enlarged, see_weights_reduced)
    """


def _resize(source: str, out: str, start: str) -> str:
    """Resize axis 2 of `source` float32 [n, a, side, 3] to S: `out` [n, a, S, 3], the sum that begins with `start`."""
    n = out
    return f"""
        {n}_first_taps = Gather <axis: int = 2> ({source}, see_first)
        {n}_zeros = Mul ({n}_first_taps, see_f0)
        {n}_start = Add ({n}_zeros, {start})
        {out} = Loop (see_num_taps, see_true, {n}_start) <
            body = {n}_tap (int64 {n}_k, bool {n}_go, float[n, a, s, 3] {n}_sum)
                => (bool {n}_go_on, float[n, a, s, 3] {n}_more) {{
                {n}_go_on = Identity ({n}_go)
                {n}_shifted = Add (see_first, {n}_k)
                {n}_place = Min ({n}_shifted, see_border)
                {n}_taps = Gather <axis: int = 2> ({source}, {n}_place)
                {n}_weight = Gather <axis: int = 1> (see_weights, {n}_k)
                {n}_weight_col = Unsqueeze ({n}_weight, see_last_axis)
                {n}_product = Mul ({n}_taps, {n}_weight_col)
                {n}_more = Add ({n}_sum, {n}_product)
            }}
        >
    """
