"""From packed groups to the two 32-bit words of a dense one, inside a Triton kernel.

Two ways that give the same bits: `prmt`, four groups at once by byte permutations (PTX, NVIDIA only), for which the codes
0 to 5 serve as selectors; and `select`, plain comparisons, which runs anywhere, in Triton's interpreter too.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl

# A selector picks, for each of the four places of a group, bytes 0x10 (the first value), 0x32 (the second) or 0x44 (zero). Each
# table below is one place's choice by code: 0 (0, 1), 1 (0, 2), 2 (0, 3), 3 (1, 2), 4 (1, 3), 5 (2, 3).
_PRMT = tl.constexpr("""
{
.reg .b32 e0, e1, e2, e3, s, t, z;
mov.b32 z, 0;
prmt.b32 e0, 0x44101010, 0x00004444, $8;
prmt.b32 e1, 0x10444432, 0x00004410, $8;
prmt.b32 e2, 0x32443244, 0x00001044, $8;
prmt.b32 e3, 0x44324444, 0x00003232, $8;
prmt.b32 s, e0, e1, 0x0040; prmt.b32 t, e2, e3, 0x0040; prmt.b32 $0, $9, z, s; prmt.b32 $1, $9, z, t;
prmt.b32 s, e0, e1, 0x0051; prmt.b32 t, e2, e3, 0x0051; prmt.b32 $2, $10, z, s; prmt.b32 $3, $10, z, t;
prmt.b32 s, e0, e1, 0x0062; prmt.b32 t, e2, e3, 0x0062; prmt.b32 $4, $11, z, s; prmt.b32 $5, $11, z, t;
prmt.b32 s, e0, e1, 0x0073; prmt.b32 t, e2, e3, 0x0073; prmt.b32 $6, $12, z, s; prmt.b32 $7, $12, z, t;
}
""")
_OUT_AND_IN = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r")


# For products without tensor cores: of the inputs of a group, two words of two halves, those that its two values meet. The
# tables are selectors of halves (0x10, 0x32, 0x54, 0x76) by code, of the first and of the second value.
_PICK = """
{
.reg .b32 f, s, c, p, a, b;
.reg .b16 h, i;
mov.b32 $0, $1;
prmt.b32 f, 0x32101010, 0x00005432, $2;
prmt.b32 s, 0x54765432, 0x00007676, $2;
prmt.b32 c, f, s, 0x0040; prmt.b32 p, $7, $8, c; MEET($3)
prmt.b32 c, f, s, 0x0051; prmt.b32 p, $9, $10, c; MEET($4)
prmt.b32 c, f, s, 0x0062; prmt.b32 p, $11, $12, c; MEET($5)
prmt.b32 c, f, s, 0x0073; prmt.b32 p, $13, $14, c; MEET($6)
}
"""
_MEET_BFLOAT16 = (
    "shl.b32 a, {v}, 16; shl.b32 b, p, 16; fma.rn.f32 $0, a, b, $0;"
    "and.b32 a, {v}, 0xffff0000; and.b32 b, p, 0xffff0000; fma.rn.f32 $0, a, b, $0;"
)
_MEET_FLOAT16 = (
    "mov.b32 {{h, i}}, {v}; cvt.f32.f16 a, h; cvt.f32.f16 b, i; mov.b32 {{h, i}}, p; cvt.f32.f16 c, h; cvt.f32.f16 p, i;"
    "fma.rn.f32 $0, a, c, $0; fma.rn.f32 $0, b, p, $0;"
)
_PICK_BFLOAT16 = tl.constexpr(re.sub(r"MEET\((\$\d)\)", lambda found: _MEET_BFLOAT16.format(v=found[1]), _PICK))
_PICK_FLOAT16 = tl.constexpr(re.sub(r"MEET\((\$\d)\)", lambda found: _MEET_FLOAT16.format(v=found[1]), _PICK))
_PICK_OUT_AND_IN = tl.constexpr("=&f,f" + 13 * ",r")


@triton.jit
def pick_bfloat16(total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3):
    """`total` plus the products of four groups of values v with their inputs: words a, b of each."""
    return tl.inline_asm_elementwise(
        _PICK_BFLOAT16, _PICK_OUT_AND_IN, [total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pick_float16(total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3):
    """As `pick_bfloat16`."""
    return tl.inline_asm_elementwise(
        _PICK_FLOAT16, _PICK_OUT_AND_IN, [total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def prmt(codes, v0, v1, v2, v3):
    """Four groups of values v, whose codes are the low 16 bits of `codes`: the words of each, low places first."""
    return tl.inline_asm_elementwise(_PRMT, _OUT_AND_IN, [codes, v0, v1, v2, v3], dtype=(tl.int32,) * 8, is_pure=True, pack=1)


@triton.jit
def select(code, v):
    """One group of values `v`, two in 32 bits: its words, low places first."""
    low = v & 0xFFFF
    top = v & -65536
    word01 = tl.where(code < 3, low, 0) | tl.where(code == 0, top, tl.where((code == 3) | (code == 4), v << 16, 0))
    first = tl.where((code == 1) | (code == 3), (v >> 16) & 0xFFFF, tl.where(code == 5, low, 0))
    word23 = first | tl.where((code == 2) | (code > 3), top, 0)
    return word01, word23


@triton.jit
def expand(codes, v0, v1, v2, v3, FAST: tl.constexpr):
    """Four groups of values v, whose codes are the low 16 bits of `codes`: the words of each, by `prmt` or else by `select`."""
    if FAST:
        a0, b0, a1, b1, a2, b2, a3, b3 = prmt(codes, v0, v1, v2, v3)
    else:
        a0, b0 = select(codes & 15, v0)
        a1, b1 = select((codes >> 4) & 15, v1)
        a2, b2 = select((codes >> 8) & 15, v2)
        a3, b3 = select((codes >> 12) & 15, v3)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit
def plane(a, b, ROWS: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr):
    """The words of (ROWS, WORDS) groups as (ROWS, 4 * WORDS) of a 16-bit `dtype`, in the order of their columns."""
    w = tl.join(a, b).reshape(ROWS, 2 * WORDS)
    return tl.join(w.to(tl.int16), (w >> 16).to(tl.int16)).reshape(ROWS, 4 * WORDS).to(dtype, bitcast=True)


@triton.jit
def planes(a0, b0, a1, b1, a2, b2, a3, b3, ROWS: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr):
    """Four planes side by side: (ROWS, 16 * WORDS)."""
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))  # rows, words, word of a group, plane // 2
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    w = tl.permute(tl.join(even, odd), (0, 3, 4, 1, 2)).reshape(ROWS, 8 * WORDS)
    return tl.join(w.to(tl.int16), (w >> 16).to(tl.int16)).reshape(ROWS, 16 * WORDS).to(dtype, bitcast=True)
