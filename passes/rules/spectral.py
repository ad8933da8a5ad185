"""Fourier transforms and resampling: positions along the transformed axes are fixed or mixed."""

from __future__ import annotations

from . import Call, Rule


def _fft(call: Call) -> str:
    """Complex to complex: every output on a transformed axis depends on every input."""
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    mixed = " ".join(names[d % rank] for d in call["dim"])
    return f"{' '.join(names)} -> {' '.join(names)}; mixed {mixed}"


def _real_fft(call: Call) -> str:
    """Real to complex or back: the last transformed axis changes its length."""
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    dims = [d % rank for d in call["dim"]]
    out = [f"b{k}" if k == dims[-1] else name for k, name in enumerate(names)]
    return f"{' '.join(names)} -> {' '.join(out)}; mixed {' '.join(names[d] for d in dims)}"


def _one_dim_fft(call: Call) -> str:
    dim = call.get("dim", -1)
    named = Call({**call.arguments, "dim": [dim]})
    same = call.get("n") in (None, call["self"][dim])
    return _fft(named) if same else _real_fft(named)


def _one_dim_real(call: Call) -> str:
    return _real_fft(Call({**call.arguments, "dim": [call.get("dim", -1)]}))


def _many_dims_fft(call: Call) -> str:
    dims = call.get("dim") or list(range(len(call["self"])))
    sizes = call.get("s")
    if sizes is not None and [call["self"][d] for d in dims] != list(sizes):
        names = [f"a{k}" for k in range(len(call["self"]))]
        gone = {d % len(names) for d in dims}
        out = [f"b{k}" if k in gone else name for k, name in enumerate(names)]
        mixed = " ".join(names[k] for k in sorted(gone))
        return f"{' '.join(names)} -> {' '.join(out)}; mixed {mixed}"
    return _fft(Call({**call.arguments, "dim": dims}))


def _grid(call: Call) -> str:
    n = len(call["input"]) - 2
    space, out = (" ".join(f"{x}{k}" for k in range(n)) for x in ("x", "y"))
    return f"n c {space}, n {out} z -> n c {out}; fixed {space} {out} z"


RULES: dict[str, Rule] = {
    **dict.fromkeys(("fft_fft", "fft_ifft"), _one_dim_fft),
    **dict.fromkeys(("fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"), _one_dim_real),
    **dict.fromkeys(("fft_fft2", "fft_ifft2", "fft_fftn", "fft_ifftn"), _many_dims_fft),
    **dict.fromkeys(("fft_rfftn", "fft_rfft2", "fft_irfftn", "fft_irfft2"), _real_fft),
    "grid_sampler": _grid,
}
