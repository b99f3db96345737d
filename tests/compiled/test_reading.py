"""The readers of machine code and of TTIR, on listings short enough to count by hand."""

import pytest
from compiled import ttir
from compiled.hot_path import hot_path
from compiled.machine_code import (
    access_width,
    bytes_moved,
    is_exp2,
    is_fp64,
    nvidia_occupancy,
    parse_amdgcn,
    parse_sass,
    widths,
)

# A loop whose block at the end, `.L_x_3`, is entered rarely and jumps back; both sides of an `if` store after the loop.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.U8 R2, desc[UR10][R2.64] ;
.L_x_1:
        /*0020*/              @!P1 LDG.E.128 R4, desc[UR10][R38.64] ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/               @P6 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FADD R6, R6, R5 ;
        /*0060*/              @!P4 BRA `(.L_x_1) ;
        /*0070*/               @P0 BRA `(.L_x_4) ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R6 ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   FADD R7, R7, R5 ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5) ;
"""
AMDGCN = """
kernel:
	s_load_dwordx2 s[0:1], s[0:1], 0x0
.LBB0_1:                                ; %loop
	buffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen
	global_load_ushort v5, v[6:7], off
	v_exp_f32_e32 v0, v0
	s_cbranch_scc1 .LBB0_1
	global_store_dword v[2:3], v1, off
	s_endpgm
"""


def test_the_hot_path_is_the_usual_trip_of_the_loop():
    listing = parse_sass(SASS)
    assert len(listing.instructions) == 15
    loop, path = hot_path(listing, bytes_moved)
    assert loop
    assert [i.opcode for i in path] == ["LDG.E.128", "MUFU.EX2", "BRA", "FADD", "BRA"]
    assert sum(map(bytes_moved, path)) == 16


def test_without_a_loop_the_heavier_branch_counts():
    straight = parse_sass(SASS.replace("              @!P4 BRA `(.L_x_1) ;", "                   NOP ;"))
    loop, path = hot_path(straight, bytes_moved)
    assert not loop
    assert widths(path, "store") == {64: 1}
    assert widths(straight.instructions, "store") == {64: 1, 32: 1}


def test_amd_listing():
    listing = parse_amdgcn(AMDGCN)
    loop, path = hot_path(listing, bytes_moved)
    assert loop
    assert widths(path, "load") == {128: 1, 16: 1}
    assert sum(is_exp2(i.opcode) for i in path) == 1
    assert widths(listing.instructions, "store") == {32: 1}


@pytest.mark.parametrize(
    ("opcode", "what", "bits"),
    [
        ("LDG.E.128", "load", 128), ("LDG.E.LTC128B.128", "load", 128), ("LDG.E.U16.CONSTANT", "load", 16),
        ("LDG.E", "load", 32), ("LDGSTS.E.BYPASS.LTC128B.128", "load", 128), ("STG.E.U8", "store", 8),
        ("STG.E.EF.64", "store", 64), ("STG.E", "load", None), ("LDS.128", "load", None), ("STL.64", "store", None),
        ("LDG.E.ENL2.256", "load", 256), ("global_load_dwordx3", "load", 96), ("buffer_store_short", "store", 16),
        ("global_load_short_d16_hi", "load", 16), ("s_load_dwordx4", "load", None), ("buffer_load_ubyte", "load", 8),
    ],
)  # fmt: skip
def test_access_widths(opcode, what, bits):
    assert access_width(opcode, what) == bits


def test_double_precision_is_recognised():
    doubles = [
        "DADD",
        "DFMA.RP",
        "F2F.F64.F32",
        "I2F.F64",
        "MUFU.RCP64H",
        "v_fma_f64",
        "v_cvt_f64_f32_e32",
        "DSETP.NEU.AND",
    ]
    singles = ["FADD", "MUFU.RCP", "I2F.U64.RP", "LDG.E.64", "DEPBAR.LE", "v_fma_f32", "F2I.FTZ.U32.TRUNC.NTZ"]
    assert [op for op in doubles + singles if is_fp64(op)] == doubles


def test_occupancy_of_the_cuda_calculator():
    assert nvidia_occupancy(90, registers=64, warps=4, shared=16) == 0.5
    assert nvidia_occupancy(90, registers=32, warps=8, shared=0) == 1.0
    assert nvidia_occupancy(90, registers=255, warps=4, shared=0) == 0.125
    assert nvidia_occupancy(90, registers=32, warps=1, shared=0) == 0.5  # 32 programs at most
    assert nvidia_occupancy(80, registers=32, warps=4, shared=82000) == 0.125  # two programs' shared memory


def kernel(body):
    lines = "\n".join("    " + line for line in body)
    return f"""module {{
  tt.func public @k(%p_ptr: !tt.ptr<bf16>, %q_ptr: !tt.ptr<f32>, %stride: i64, %n: i32, %T: i32) {{
    %c3 = arith.constant 3 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
{lines}
    tt.return
  }}
}}"""


WIDE = [
    "%w = arith.extsi %pid : i32 to i64",
    "%o = arith.muli %w, %stride : i64",
    "%a = tt.addptr %p_ptr, %o : !tt.ptr<bf16>, i64",
]
NARROW = ["%o = arith.muli %pid, %T : i32 loc(#loc1)", "%a = tt.addptr %p_ptr, %o : !tt.ptr<bf16>, i32 loc(#loc1)"]
TRIPLE = ["%o = arith.muli %pid, %c3 : i32", "%a = tt.addptr %q_ptr, %o : !tt.ptr<f32>, i32"]
IN_A_ROW = [
    "%r = arith.remsi %pid, %n : i32",
    "%o = arith.muli %r, %c3 : i32",
    "%a = tt.addptr %p_ptr, %o : !tt.ptr<bf16>, i32",
]
LATE_CAST = [NARROW[0], "%w = arith.extsi %o : i32 to i64", "%a = tt.addptr %q_ptr, %w : !tt.ptr<f32>, i64"]
CHOSEN = [
    "%s = arith.select %b, %p_ptr, %q_ptr : !tt.ptr<bf16>",
    NARROW[0],
    "%a = tt.addptr %s, %o : !tt.ptr<bf16>, i32",
]
IN_A_LOOP = [
    NARROW[0],
    "%l:2 = scf.for %i = %o to %n step %c3 iter_args(%x = %f, %y = %f) -> (f32, f32)  : i32 {",
    "  %a = tt.addptr %q_ptr, %i : !tt.ptr<f32>, i32",
    "  scf.yield %x, %y : f32, f32",
    "}",
]
CARRIED = [
    NARROW[0],
    "%l:2 = scf.for %i = %c3 to %n step %c3 iter_args(%x = %c3, %y = %c3) -> (i32, i32)  : i32 {",
    "  %a = tt.addptr %q_ptr, %x : !tt.ptr<f32>, i32",
    "  %e = tt.addptr %p_ptr, %y : !tt.ptr<bf16>, i32",
    "  scf.yield %c3, %o : i32, i32",
    "}",
]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (WIDE, []), (NARROW, ["p_ptr"]), (TRIPLE, ["q_ptr"]), (IN_A_ROW, []), (LATE_CAST, ["q_ptr"]),
        (CHOSEN, ["p_ptr", "q_ptr"]), (IN_A_LOOP, ["q_ptr"]), (CARRIED, ["p_ptr"]),
    ],
    ids=["wide", "narrow", "constant", "remainder", "late cast", "chosen", "loop", "carried"],
)  # fmt: skip
def test_narrow_addresses(body, found):
    assert ttir.narrow_addresses(kernel(body)) == found


def test_narrow_arithmetic():
    body = [
        "%x = arith.extf %h : tensor<8xbf16> to tensor<8xf32> loc(#loc1)",
        "%y = arith.addf %h, %h : tensor<8xbf16> loc(#loc1)",
        "%z = math.exp2 %d : f64 loc(#loc1)",
        "%m = arith.maxnumf %h, %h : f16 loc(#loc1)",
        "%ok = arith.mulf %x, %x : tensor<8xf32> loc(#loc1)",
        "%out = arith.truncf %ok : tensor<8xf32> to tensor<8xbf16> loc(#loc1)",
    ]
    assert [line.split(" ")[0] for line in ttir.narrow_arithmetic(kernel(body))] == ["%y", "%z", "%m"]


def test_streamed_bytes():
    body = [
        "%x = tt.load %a, %m, %o : tensor<4096x!tt.ptr<bf16>>",
        "tt.store %a, %x, %m : tensor<8192x!tt.ptr<bf16>>",
        "tt.store %b, %y : tensor<16384x!tt.ptr<f32>>",
    ]
    assert ttir.streamed_bytes(kernel(body), "bf16") == {"load": 8192, "store": 16384}
