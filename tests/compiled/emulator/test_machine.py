"""The emulated machine: threads, memory, races and what a GPU would not report, on kernels written by hand."""

import numpy as np
import pytest
import torch
from compiled.emulator import ptx
from compiled.emulator.machine import Machine, Options
from compiled.emulator.memory import GlobalMemory, KernelError

HEADER = """
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u32 k_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
"""


def run(body: str, size: int = 64, blocks: int = 1, seed: int = 0):
    """Run a hand-written kernel on 64 threads and a tensor of int32; return the tensor, races and traffic."""
    out = torch.zeros(size, dtype=torch.int32)
    memory = GlobalMemory([out])
    machine = Machine(ptx.parse(HEADER + body + "\n}\n"), [out.data_ptr(), 7], memory, 256, Options(seed))
    races = machine.run((blocks,))
    traffic = memory.report()
    return out, races + traffic.races, traffic


def test_threads_that_part_meet_again():
    out, races, traffic = run("""
        setp.lt.u32 %p1, %r1, 5;
        @%p1 bra $small;
        mov.b32 %r2, 100;
        bra.uni $end;
    $small:
        shl.b32 %r2, %r1, 1;
    $end:
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        st.global.b32 [ %rd2 + 0 ], { %r3 };
        ret;""")
    assert out[:7].tolist() == [2, 0, 6, 4, 100, 8, 100]
    assert not races
    assert (traffic.stored, traffic.sectors_stored, traffic.requests) == (256, 8, 2)


def test_lanes_are_asked_by_number():
    out, *_ = run("""
        shr.u32 %r2, %r1, 1;
        shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;
        st.global.b32 [%rd2], %r3;
        ret;""")
    assert out.tolist() == [t // 32 * 32 + t // 2 % 32 for t in range(64)]


def test_a_loop_that_each_thread_leaves_in_its_own_time():
    out, *_ = run("""
        mov.b32 %r2, 0;
    $loop:
        add.s32 %r2, %r2, 3;
        setp.lt.u32 %p1, %r2, %r1;
        @%p1 bra $loop;
        st.global.b32 [%rd2], %r2;
        ret;""")
    assert out.tolist() == [max(3, 3 * -(-t // 3)) for t in range(64)]


THROUGH_SHARED = """
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, global_smem;
    add.s32 %r4, %r4, %r5;
    xor.b32 %r6, %r4, {distance};
    st.shared.b32 [%r4], %r1;
    {barrier}
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd2], %r7;
    ret;"""


@pytest.mark.parametrize(
    ("barrier", "distance", "safe"),
    [
        ("bar.sync 0;", 128, True), ("", 128, False), ("", 0, True),
        ("bar.warp.sync -1;", 128, False), ("bar.warp.sync -1;", 4, True),
    ],
)  # fmt: skip
def test_shared_memory_needs_the_right_barrier(barrier, distance, safe):
    body = THROUGH_SHARED.format(barrier=barrier, distance=distance)
    _, races, _ = run(body)
    assert bool(races) != safe


def test_threads_and_blocks_that_write_one_place_race():
    assert run("st.global.b32 [%rd1], %r1;\nret;")[1]
    assert run("mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd2], %r2;\nret;", blocks=2)[1]
    assert not run("st.global.b32 [%rd2], %r1;\nret;")[1]
    assert not run("mov.b32 %r2, 5;\nst.global.b32 [%rd1], %r2;\nret;", blocks=2)[1]  # all write the same


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd2+4], %r1;\nret;", "out of bounds"),
        ("st.global.b32 [%rd2+2], %r1;\nret;", "misaligned"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd2];\nret;", "misaligned"),
        ("mov.b32 %r2, 0;\nld.shared.b32 %r3, [%r2];\nret;", "uninitialised shared"),
        ("setp.lt.u32 %p1, %r1, 5;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\nret;", "lanes are missing"),
        ("$a:\nadd.s32 %r2, %r2, 1;\nbra $a;\nret;", "does not end"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;\nret;", "have left"),
        ("setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $a;\nbar.sync 0;\nret;\n$a:\nbar.sync 0;\nret;", "different barriers"),
    ],
)
def test_what_a_gpu_would_not_report(body, message):
    with pytest.raises(KernelError, match=message):
        run(body)


def test_a_register_that_nobody_set_is_noise():
    body = "st.global.b32 [%rd2], %r8;\nret;"
    assert not torch.equal(run(body, seed=0)[0], run(body, seed=1)[0])


def test_matrices_go_through_shared_memory_and_back():
    body = """
        shl.b32 %r2, %r1, 4;
        shl.b32 %r3, %r1, 16;
        add.s32 %r4, %r3, %r1;
        and.b32 %r2, %r2, 511;
        setp.lt.u32 %p1, %r1, 32;
        @%p1 stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r2], {%r4, %r4, %r4, %r4};
        @%p1 bar.warp.sync -1;
        @%p1 ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r5, %r6, %r7, %r8}, [%r2];
        @%p1 st.global.b32 [%rd2], %r7;
        ret;"""
    out = torch.zeros(64, dtype=torch.int32)
    memory = GlobalMemory([out])
    machine = Machine(ptx.parse(HEADER + body + "\n}\n"), [out.data_ptr(), 7], memory, 512, Options())
    assert not machine.run((1,))
    assert out[:32].tolist() == [t << 16 | t for t in range(32)]
    row = machine.shared.words.view(np.uint16).reshape(4, 8, 8)[1, 0]  # column 0 of every lane's fragment
    assert row.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
