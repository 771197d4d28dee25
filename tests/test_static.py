"""bench.static: its counting on small examples, its gate on planted faults, and all kernels on all architectures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.chips import CHIPS
from bench.static.cases import cases
from bench.static.flow import Instruction, basic_blocks, natural_loops
from bench.static.machine import access_bits, widths_by_argument
from bench.static.traffic import evaluate
from bench.static.ttir import parse

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process in which Triton compiles: this one may have it interpret."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels/torch-ext", ROOT / "kernels/cpu")))
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


# rows of 6, in tiles of 2 x 4 elements: two steps along a row, the second one half empty; the data is read twice
TTIR = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f16>, %out_ptr: !tt.ptr<f32>, %D: i32) attributes {noinline = false} {
    %c2_i32 = arith.constant 2 : i32
    %c4_i32 = arith.constant 4 : i32
    %c0_i32 = arith.constant 0 : i32
    %zero = arith.constant dense<0.000000e+00> : tensor<2x4xf16>
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %first = arith.muli %pid, %c2_i32 : i32
    %i = tt.make_range {end = 2 : i32, start = 0 : i32} : tensor<2xi32>
    %first_0 = tt.splat %first : i32 -> tensor<2xi32>
    %row = arith.addi %first_0, %i : tensor<2xi32>
    %row_1 = tt.expand_dims %row {axis = 1 : i32} : tensor<2xi32> -> tensor<2x1xi32>
    %D_2 = tt.splat %D : i32 -> tensor<2x1xi32>
    %start = arith.muli %row_1, %D_2 : tensor<2x1xi32>
    %base = tt.splat %x_ptr : !tt.ptr<f16> -> tensor<2x1x!tt.ptr<f16>>
    %base_3 = tt.addptr %base, %start : tensor<2x1x!tt.ptr<f16>>, tensor<2x1xi32>
    %sum = scf.for %col = %c0_i32 to %D step %c4_i32 iter_args(%acc = %zero) -> (tensor<2x4xf16>)  : i32 {
      %j = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32>
      %j_4 = tt.expand_dims %j {axis = 0 : i32} : tensor<4xi32> -> tensor<1x4xi32>
      %col_5 = tt.splat %col : i32 -> tensor<1x4xi32>
      %col_6 = arith.addi %col_5, %j_4 : tensor<1x4xi32>
      %end = tt.splat %D : i32 -> tensor<1x4xi32>
      %inside = arith.cmpi slt, %col_6, %end : tensor<1x4xi32>
      %mask = tt.broadcast %inside : tensor<1x4xi1> -> tensor<2x4xi1>
      %p = tt.broadcast %base_3 : tensor<2x1x!tt.ptr<f16>> -> tensor<2x4x!tt.ptr<f16>>
      %col_7 = tt.broadcast %col_6 : tensor<1x4xi32> -> tensor<2x4xi32>
      %p_8 = tt.addptr %p, %col_7 : tensor<2x4x!tt.ptr<f16>>, tensor<2x4xi32>
      %x = tt.load %p_8, %mask, %zero : tensor<2x4x!tt.ptr<f16>>
      %again = tt.load %p_8, %mask, %zero : tensor<2x4x!tt.ptr<f16>>
      %acc_9 = arith.addf %acc, %x : tensor<2x4xf16>
      scf.yield %acc_9 : tensor<2x4xf16>
    }
    %total = "tt.reduce"(%sum) <{axis = 1 : i32}> ({
    ^bb0(%a: f16, %b: f16):
      %c = arith.addf %a, %b : f16
      tt.reduce.return %c : f16
    }) : (tensor<2x4xf16>) -> tensor<2xf16>
    %out = tt.splat %out_ptr : !tt.ptr<f32> -> tensor<2x!tt.ptr<f32>>
    %out_10 = tt.addptr %out, %row : tensor<2x!tt.ptr<f32>>, tensor<2xi32>
    tt.store %out_10, %total : tensor<2x!tt.ptr<f32>>
    tt.return
  }
}
"""


def test_traffic_counts_unmasked_lanes_and_each_load_on_its_own():
    x, out = torch.zeros(4, 6, dtype=torch.float16), torch.zeros(4)
    traffic = evaluate(parse(TTIR), {"%x_ptr": x, "%out_ptr": out, "%D": 6}, num_programs=2)
    found = [(site.argument, site.kind, site.unique, site.requested) for site in traffic.sites]
    assert found == [
        ("%x_ptr", "load", x.nbytes, x.nbytes),
        ("%x_ptr", "load", x.nbytes, x.nbytes),
        ("%out_ptr", "store", out.nbytes, out.nbytes),
    ]
    assert [(loop.trips, loop.constant, loop.children) for loop in traffic.loops] == [(2 * 2, False, [])]


def test_traffic_tells_repeated_visits_from_first_ones():
    # all four rows are one and the same: 12 bytes exist
    x, out = torch.zeros(1, 6, dtype=torch.float16), torch.zeros(4)
    text = TTIR.replace("%start = arith.muli %row_1, %D_2", "%start = arith.subi %row_1, %row_1")
    traffic = evaluate(parse(text), {"%x_ptr": x, "%out_ptr": out, "%D": 6}, num_programs=2)
    assert [(site.unique, site.requested) for site in traffic.sites] == [(12, 48), (12, 48), (16, 16)]


def test_traffic_outside_a_tensor_is_an_error():
    x, out = torch.zeros(3, 6, dtype=torch.float16), torch.zeros(4)
    with pytest.raises(IndexError):
        evaluate(parse(TTIR), {"%x_ptr": x, "%out_ptr": out, "%D": 6}, num_programs=2)


def test_matrix_products_are_counted_as_often_as_they_run():
    x, out = torch.zeros(4, 6, dtype=torch.float16), torch.zeros(4)
    operands = "%x, %x, %acc, inputPrecision = tf32 : tensor<16x8xf32> * tensor<8x32xf32> -> tensor<16x32xf32>"
    text = TTIR.replace("scf.yield %acc_9", f"%product = tt.dot {operands}\n      scf.yield %acc_9")
    traffic = evaluate(parse(text), {"%x_ptr": x, "%out_ptr": out, "%D": 6}, num_programs=2)
    assert traffic.products == {"tf32": 2 * 2 * (2 * 16 * 32 * 8)}
    halves = evaluate(parse(text.replace("xf32>", "xbf16>")), {"%x_ptr": x, "%out_ptr": out, "%D": 6}, num_programs=1)
    assert halves.products == {"16 bits": 2 * (2 * 16 * 32 * 8)}


def test_traffic_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match="control flow"):
        parse(TTIR.replace("tt.return", "cf.br ^bb1"))
    text = TTIR.replace("arith.addi %first_0, %i", "arith.fancy %first_0, %i")
    arguments = {"%x_ptr": torch.zeros(4, 6, dtype=torch.float16), "%out_ptr": torch.zeros(4), "%D": 6}
    with pytest.raises(ValueError, match="an address"):
        evaluate(parse(text), arguments, num_programs=2)


def test_loops_nest_and_code_behind_the_end_is_left_out():
    code = [
        Instruction("ENTER"),
        Instruction(label="outer"),
        Instruction("A"),
        Instruction(label="inner"),
        Instruction("B"),
        Instruction("BRA", target="inner"),
        Instruction("C"),
        Instruction("BRA", target="outer"),
        Instruction("EXIT", falls_through=False),
        Instruction(label="end"),
        Instruction("BRA", target="end", falls_through=False),
    ]
    blocks = basic_blocks(code)
    assert [block.opcodes for block in blocks] == [["ENTER"], ["A"], ["B", "BRA"], ["C", "BRA"], ["EXIT"]]
    (outer,) = natural_loops(blocks)
    assert outer.blocks == {1, 2, 3}
    assert [(inner.blocks, inner.children) for inner in outer.children] == [({2}, [])]


@pytest.mark.parametrize(
    ("opcode", "access"),
    [
        ("LDG.E", ("load", 32)),
        ("LDG.E.128.CONSTANT", ("load", 128)),
        ("LDG.E.LTC128B.64", ("load", 64)),
        ("STG.E.U8", ("store", 8)),
        ("global_load_dwordx4", ("load", 128)),
        ("buffer_store_dwordx2", ("store", 64)),
        ("buffer_load_ubyte", ("load", 8)),
        ("buffer_load_ushort", ("load", 16)),
        ("LDGSTS.E.BYPASS.LTC128B.128", ("load", 128)),
        ("LDS.128", None),
        ("LDL", None),
        ("s_load_dwordx4", None),
    ],
)
def test_access_widths(opcode, access):
    assert access_bits(opcode) == access


def test_ptx_accesses_belong_to_arguments():
    ptx = """
        ld.param.b64 \t%rd1, [kernel_param_0];
        ld.param.b64 \t%rd2, [kernel_param_2];
        mad.wide.s32 \t%rd3, %r4, 4, %rd1;
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
        add.s64 \t%rd4, %rd2, %rd5;
        @%p1 st.global.L1::evict_last.v2.b16 [ %rd4 + 16 ], { %rs1, %rs2 };
        st.global.b32 [ %rd4 + 0 ], { %r7 };
        @%p2 cp.async.ca.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x8, %r10;
    """
    assert widths_by_argument(ptx, ["x_ptr", "n", "y_ptr"]) == {"x_ptr": [128, 64], "y_ptr": [32]}


def test_the_model_names_the_unit_that_binds():
    chip = CHIPS["sm_90"]
    assert chip.model(chip.dram, 0, 0)[:2] == (1e6, "DRAM")
    lanes = chip.multiprocessors * chip.clock
    assert chip.model(1, lanes * chip.issue_lanes, 1)[:2] == (1e6, "issue")
    assert chip.model(1, lanes * chip.special_lanes, 2 * lanes * chip.special_lanes).bound == "SFU"
    assert chip.model(1, 0, 0, {"16 bits": chip.tensor["16 bits"]})[:2] == (1e6, "tensor")
    # what has no tensor cores is counted as instructions
    assert chip.model(chip.dram, 0, 0, {"fp32": 1e30})[:2] == (1e6, "DRAM")


def test_cases_have_names_of_their_own():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    done = run("tests/static_plants.py", str(tmp_path_factory.mktemp("plants")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


UPDATE = "python -m bench.static --update-baseline"


def test_the_gate_is_silent_when_nothing_got_worse(complaints):
    assert complaints["good"] is None


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("spill", "spills ("),
        ("second read", "bytes moved 2,113,536, now 3,178,496 (+50.4 %)"),
        ("second visit", "bytes requested, repeated visits counted 2,113,536, now 4,210,688 (+99.2 %)"),
        ("extra launch", "1 launches, now 2 (_row_sums_kernel, aten::clone)"),
        ("more work", "instructions per element"),
        ("narrow", "mu_ptr had 128 to 128 bits, now 32 to 32"),
        ("no baseline", "no baseline in"),
        ("renamed", "not in the baseline"),
        ("renamed", "4096x64 once: in the baseline, but no longer compiled"),
        ("spill, other triton", "spills ("),
        ("narrow, other triton", "mu_ptr had 128 to 128 bits, now 32 to 32"),
    ],
)
def test_the_gate_reports_planted_faults_and_how_to_accept_them(complaints, plant, says):
    assert says in complaints[plant]
    assert UPDATE in complaints[plant]


def test_counts_of_another_triton_are_not_compared(complaints):
    assert complaints["second read, other triton"] is None


def test_the_gate_passes_for_this_tree():
    done = run(
        "-m", "bench.static", "--check", "--arch", "sm_90", "gfx942", "--op", "kl_standard_normal fwd", "--jobs", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 results are no worse than static_baseline.json" in done.stdout


@pytest.mark.parametrize("op", ["adam_flat_", "reparameterize_kl bwd, column sums fp32"])
def test_least_bytes_count_reads_and_writes_of_memory_that_is_given(op, tmp_path):
    """Adam overwrites three of its four buffers, the latents' backward two that it does not read."""
    out = tmp_path / "static.json"
    done = run("-m", "bench.static", "--op", op, "--arch", "sm_90", "--out", str(out))
    assert done.returncode == 0, done.stderr
    _, result = json.loads(out.read_text())
    assert result["bytes"] == pytest.approx(result["least_bytes"], rel=1e-3)


def test_interpreted_kernels_are_refused():
    done = run("-m", "bench.static", "--check", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    out = tmp_path_factory.mktemp("static") / "static.json"
    done = run("-m", "bench.static", "--out", str(out))
    assert done.returncode == 0, done.stderr
    header, *results = json.loads(out.read_text())
    assert header["bench"] == "static"
    return results


@pytest.mark.slow
def test_every_kernel_compiles_everywhere_without_spill_or_stack(everywhere):
    assert {r["architecture"] for r in everywhere} == set(CHIPS)
    assert {r["case"] for r in everywhere} == {case.name for case in cases() if case.main}
    found = [(r["architecture"], r["case"], kernel) for r in everywhere for kernel in r["kernels"]]
    assert not [where for *where, kernel in found if kernel["spills"] or kernel["stack"]]


DRAWN = re.compile("binari[sz]e|dequantize")


@pytest.mark.slow
def test_accesses_are_as_wide_as_the_layout_allows(everywhere):
    narrow = []
    for result in everywhere:
        for kernel in result["kernels"]:
            where = (result["architecture"], result["case"], kernel["name"])
            large = {
                name: argument
                for name, argument in kernel["arguments"].items()
                # sums per row or column, the seed; the words are for tests, four planes of 64-bit values
                if argument["bytes"] > 0.05 * result["bytes"] and kernel["name"] != "_philox_words_kernel"
            }
            for name, argument in large.items():
                # bytes come with wider values, of which a thread takes 128 bits
                least = 8 * argument["aligned"] if argument["itemsize"] > 1 else 32
                widths = argument["widths"] or kernel["loads"] + kernel["stores"]
                # AMD's layouts stay with the four elements of a Philox call
                if result["architecture"] == "gfx942" and DRAWN.search(result["case"]):
                    least = min(least, 8 * 4 * argument["itemsize"])
                if max(widths) < least:
                    narrow.append((*where, name, widths))
    assert not narrow
