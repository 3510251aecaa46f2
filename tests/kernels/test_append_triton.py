"""The Triton append, through Triton's interpreter, against its reference; and the reference against plain indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.append import QueryTurn, append_reference

BATCH, PAGES, SIZE = 3, 4, 16


def states(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`(batch, heads, 1, dim)` as models make it: a transposed view of a wider buffer, last token of two."""
    wide = torch.randn(BATCH, 2, heads, dim + 8).to(dtype)
    return wide[:, 1:, :, :dim].transpose(1, 2)


def orthogonal(dim: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim))[0].to(dtype).contiguous()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def problem(
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (32, 32),
    variants: int = 2,
    rotary: int | None = None,
    start: int = 0,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], dict[str, object]]:
    """Arguments of `append`; the pages hold NaN, so what was written shows."""
    key_dim, value_dim = dims
    arguments = [states(heads, key_dim, dtype), states(kv_heads, key_dim, dtype), states(kv_heads, value_dim, dtype)]
    slots = torch.tensor([3 * SIZE + 1, -1, SIZE - 1])
    pages = [torch.full((kv_heads, PAGES, SIZE, dim), torch.nan, dtype=dtype) for dim in dims]
    half = (key_dim if rotary is None else rotary) // 2
    angle = 3 * torch.rand(BATCH, variants, half)
    angle[:, 0] = 0
    turned = QueryTurn(angle.cos(), angle.sin(), start, interleaved) if half else None
    return [*arguments, slots, *pages], {"variants": variants, "turned": turned}


def agree(arguments: list[Tensor], options: dict[str, object], tolerance: float = 1e-6) -> None:
    """Kernel and reference leave the same query variants and the same pages."""
    pytest.importorskip("triton")
    from hf_ctxopt.kernels.append_triton import append

    mine = [argument.clone() if index > 3 else argument for index, argument in enumerate(arguments)]
    want = append_reference(*arguments, **options)  # type: ignore[arg-type]
    out = torch.full_like(want, torch.nan)
    got = append(*mine, **options, out=out)  # type: ignore[arg-type]
    assert got is out
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    for index in (4, 5):
        torch.testing.assert_close(mine[index], arguments[index], rtol=0, atol=tolerance, equal_nan=True)


def test_reference_writes_the_named_slots_only() -> None:
    arguments, options = problem()
    query, keys, values, _, raw_keys, raw_values = arguments
    out = append_reference(*arguments, **options)  # type: ignore[arg-type]
    assert torch.equal(raw_keys[:, 3, 1], keys[0, :, 0])
    assert torch.equal(raw_values[:, 0, SIZE - 1], values[2, :, 0])
    assert raw_keys.isfinite().sum() == 2 * keys[0].numel()
    assert raw_values.isfinite().sum() == 2 * values[0].numel()
    assert torch.equal(out[:, 0], query[:, :, 0])
    assert not torch.allclose(out[:, 1], out[:, 0])


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 1), (6, 2)])
def test_head_sizes(dims: tuple[int, int], heads: tuple[int, int]) -> None:
    agree(*problem(*heads, dims))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary", "start"), [(None, 0), (16, 0), (16, 16), (12, 4), (0, 0)])
@pytest.mark.parametrize("variants", [1, 3])
def test_layouts(rotary: int | None, start: int, interleaved: bool, variants: int) -> None:
    agree(*problem(rotary=rotary, start=start, interleaved=interleaved, variants=variants))


@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (192, 128)])
@pytest.mark.parametrize("turned", [(True, True), (True, False), (False, True)])
def test_a_fixed_basis(dims: tuple[int, int], turned: tuple[bool, bool]) -> None:
    arguments, options = problem(8, 2, dims)
    for name, dim, wanted in zip(("key_basis", "value_basis"), dims, turned, strict=True):
        options[name] = orthogonal(dim, torch.float32) if wanted else None
    agree(arguments, options, 1e-5)


def test_half_precision_and_narrow_slots() -> None:
    arguments, options = problem(dtype=torch.float16)
    arguments[3] = arguments[3].int()
    agree(arguments, options, 2e-3)
    arguments, options = problem(dtype=torch.float16)
    agree(arguments, options | {"key_basis": orthogonal(32, torch.float16)}, 4e-3)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("query", lambda a, o: a.__setitem__(0, a[0].repeat(1, 1, 2, 1))),
        ("keys", lambda a, o: a.__setitem__(1, a[1][:, :1])),
        ("slots", lambda a, o: a.__setitem__(3, a[3].float())),
        ("raw_keys", lambda a, o: a.__setitem__(4, a[4].transpose(1, 2))),
        ("turned", lambda a, o: o.__setitem__("variants", 3)),
        ("key_basis", lambda a, o: o.__setitem__("key_basis", torch.eye(16))),
    ],
)
def test_refuses_what_does_not_belong_together(field: str, change: object) -> None:
    arguments, options = problem()
    change(arguments, options)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=field):
        append_reference(*arguments, **options)  # type: ignore[arg-type]
